"""Sizes of vllm engines: what vLLM can build, and how many engines there are."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.config import derive_layout
from dapo_megatron.config.derive import derive_engines, vllm_tensor_problems
from dapo_megatron.errors import RequestError
from tests.config.test_derive_layout import QWEN25_32B, recipe, refusal


@pytest.mark.parametrize(
    ("tensor", "shape", "line"),
    [
        (3, {}, "rollout.tensor=3 does not divide 40 attention heads; use 1, 2, 4 or 8"),
        (5, {}, "rollout.tensor=5 neither divides 8 key/value heads nor is a multiple of them; use 1, 2, 4 or 8"),
        (8, {"ffn": 27652}, "rollout.tensor=8 does not divide ffn size 27652; use 1, 2 or 4"),
        (
            3,
            {"heads": 6, "kv_heads": 3, "hidden": 768},
            "rollout.tensor=3 does not divide the 151936 rows of the padded vocabulary; use 1",
        ),
        (
            1,
            {"hidden": 4096, "heads": 40, "kv_heads": 8},
            "rollout.engine=vllm builds qwen2 with head_dim=102 (hidden size / heads) and the model has 128; "
            "use rollout.engine=hf",
        ),
    ],
)
def test_refusals(tensor, shape, line):
    architecture = replace(QWEN25_32B, **{"vocab": 151935, **shape})
    assert line in vllm_tensor_problems(tensor, architecture)
    assert line in refusal({}, shape=architecture, rollout={"engine": "vllm", "tensor": tensor}).splitlines()
    derive_layout(recipe(), architecture)  # no matter to the hf engine


def test_other_families_choose_their_head_dim():
    assert vllm_tensor_problems(1, replace(QWEN25_32B, family="llama", hidden=4096)) == []


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 6), st.integers(1, 400), st.integers(1, 2000))
def test_a_size_is_refused_only_where_something_does_not_divide(tensor, kv_heads, group, ffn, vocab):
    heads = kv_heads * group
    shape = replace(QWEN25_32B, heads=heads, kv_heads=kv_heads, hidden=heads * 128, ffn=ffn, vocab=vocab)
    works = not (heads % tensor or ffn % tensor or -(-vocab // 64) * 64 % tensor) and (
        kv_heads % tensor == 0 or tensor % kv_heads == 0
    )
    assert works == (vllm_tensor_problems(tensor, shape) == [])


def test_how_many_engines():
    def engines(cpu: bool = False, **rollout: object) -> int:
        settings = recipe(parallel={"tensor": 2, "world": 12}, rollout={"engine": "vllm", **rollout})
        return derive_engines(settings, derive_layout(settings, QWEN25_32B), cpu=cpu)

    assert engines(tensor=4) == 3 and engines(tensor=8) == 1  # as many as the learner's devices hold
    assert engines(tensor=8, engines=5) == 5
    assert engines(tensor=1, cpu=True) == 1
    assert engines(servers=["http://a:1", "http://b:1"]) == 2
    with pytest.raises(RequestError, match=r"rollout\.tensor=40 exceeds the learner's 12 ranks.*use 12 or less"):
        engines_of_40 = recipe(parallel={"tensor": 2, "world": 12}, rollout={"engine": "vllm", "tensor": 40})
        derive_engines(engines_of_40, derive_layout(recipe(parallel={"tensor": 2, "world": 12}), QWEN25_32B), cpu=False)
