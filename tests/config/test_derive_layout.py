"""The layout that follows from a recipe and a model, and sizes that do not divide."""

import math
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dapo_megatron.config import Architecture, Layout, Recipe, derive_layout
from dapo_megatron.errors import RequestError

QWEN25_32B = Architecture(
    family="qwen2", layers=64, hidden=5120, heads=40, kv_heads=8, head_dim=128, ffn=27648, vocab=152064, tied=False,
    qkv_bias=True, qk_norm=False, rms_eps=1e-5, rope_theta=1e6, rope_scaling=None, max_positions=131072,
    sliding_window=None, eos_token_ids=(151643,), init_std=0.02, torch_dtype="bfloat16",
)  # fmt: skip


def recipe(**sections: dict) -> Recipe:
    return Recipe.model_validate({"run": {"directory": "out"}, "model": {"path": "hf"}} | sections)


def refusal(parallel: dict, world: int | None = None, shape: Architecture = QWEN25_32B, **sections: dict) -> str:
    with pytest.raises(RequestError) as caught:
        derive_layout(recipe(parallel=parallel, **sections), shape, world)
    return str(caught.value)


def test_the_paper_on_128_ranks():
    parallel = {"tensor": 8, "pipeline": 4, "virtual_pipeline": 2, "sequence": True, "world": 128}
    assert derive_layout(recipe(parallel=parallel), QWEN25_32B) == Layout(
        world=128,
        tensor=8,
        pipeline=4,
        virtual_pipeline=2,
        context=1,
        data=4,
        sequence_parallel=True,
        layers_per_chunk=8,
        mini_batch_prompts=32,
        updates_per_step=16,
        responses_per_step=8192,
        padded_vocab=152064,
    )


def test_which_world_counts():
    assert derive_layout(recipe(parallel={"tensor": 2, "pipeline": 2}), QWEN25_32B).world == 4
    assert derive_layout(recipe(parallel={"tensor": 2, "world": 6}), QWEN25_32B).data == 3
    given_world = derive_layout(recipe(parallel={"tensor": 2, "world": 6}), QWEN25_32B, world=8)
    assert (given_world.world, given_world.data) == (8, 4)


def test_more_tensor_ranks_than_key_value_heads():
    shape = replace(QWEN25_32B, heads=16, kv_heads=2, ffn=4096)
    assert derive_layout(recipe(parallel={"tensor": 8}), shape).tensor == 8


@pytest.mark.parametrize(
    ("parallel", "shape", "line"),
    [
        ({"tensor": 3}, {"ffn": 27648}, "parallel.tensor=3 does not divide 40 attention heads; use 1, 2, 4 or 8"),
        (
            {"tensor": 5},
            {"ffn": 27650},
            "parallel.tensor=5 neither divides 8 key/value heads nor is a multiple of them; use 1 or 2",
        ),
        ({"tensor": 8}, {"ffn": 27652}, "parallel.tensor=8 does not divide ffn size 27652; use 1, 2 or 4"),
        ({"pipeline": 3}, {}, "parallel.pipeline=3 does not divide 64 layers; use 2 or 4"),
        ({"pipeline": 65}, {}, "parallel.pipeline=65 does not divide 64 layers; use 64"),
        (
            {"pipeline": 4, "virtual_pipeline": 3},
            {},
            "parallel.pipeline=4 x parallel.virtual_pipeline=3 = 12 does not divide 64 layers; "
            "use a product of 8 or 16",
        ),
        (
            {"virtual_pipeline": 2},
            {},
            "parallel.virtual_pipeline=2 needs parallel.pipeline > 1; use virtual_pipeline=1",
        ),
        ({"sequence": True}, {}, "parallel.sequence=true needs parallel.tensor > 1; use parallel.sequence=false"),
        (
            {"tensor": 4, "pipeline": 2, "world": 12},
            {},
            "parallel.world=12 is not a multiple of 8 = parallel.tensor 4 x parallel.pipeline 2 x parallel.context 1; "
            "use 8 or 16",
        ),
        (
            {"tensor": 4, "world": 3},
            {},
            "parallel.world=3 is not a multiple of 4 = parallel.tensor 4 x parallel.pipeline 1 x parallel.context 1; "
            "use 4",
        ),
    ],
)
def test_refusals(parallel, shape, line):
    # one size may break two rules, each with a line of its own
    assert line in refusal(parallel, shape=replace(QWEN25_32B, **shape)).splitlines()


def test_a_world_that_exists_is_named_as_such():
    assert refusal({"tensor": 4, "world": 8}, world=6).startswith("world=6 is not a multiple of 4 = ")


@pytest.mark.parametrize(
    ("prompts", "mini_batch", "use"), [(512, 48, "use 32 or 64"), (12, 13, "use 12"), (7, 3, "use 1 or 7")]
)
def test_mini_batches_divide_the_step(prompts, mini_batch, use):
    told = refusal({}, rollout={"prompts_per_step": prompts}, algorithm={"mini_batch_prompts": mini_batch})
    assert told == (
        f"algorithm.mini_batch_prompts={mini_batch} does not divide rollout.prompts_per_step={prompts}; {use}"
    )


def test_everything_that_does_not_divide_is_told_at_once():
    told = refusal(
        {"tensor": 7, "pipeline": 3, "context": 2, "world": 5},
        algorithm={"mini_batch_prompts": 33},
    ).splitlines()
    assert len(told) == 6
    for words in (
        "40 attention heads",
        "8 key/value heads",
        "ffn size 27648",
        "64 layers",
        "parallel.world=5 is not a multiple of 42",
        "mini_batch_prompts=33",
    ):
        assert sum(words in line for line in told) == 1, words


powers = st.sampled_from([1, 2, 4, 8])


@given(
    tensor=powers, pipeline=powers, chunks=powers, context=powers, data=st.integers(1, 9), vocab=st.integers(1, 10**6)
)
def test_a_layout_is_consistent(tensor, pipeline, chunks, context, data, vocab):
    assume(pipeline > 1 or chunks == 1)
    world = tensor * pipeline * context * data
    parallel = {"tensor": tensor, "pipeline": pipeline, "virtual_pipeline": chunks, "context": context}
    layout = derive_layout(recipe(parallel=parallel), replace(QWEN25_32B, vocab=vocab), world)
    assert layout.world == layout.tensor * layout.pipeline * layout.context * layout.data == world
    assert layout.layers_per_chunk * pipeline * chunks == 64
    assert layout.padded_vocab >= vocab
    assert layout.padded_vocab % tensor == layout.padded_vocab % 64 == 0
    assert layout.padded_vocab - math.lcm(tensor, 64) < vocab


@given(tensor=st.integers(1, 80), heads=st.integers(1, 12), group=st.integers(1, 6), ffn=st.integers(1, 400))
def test_the_tensor_sizes_proposed_work(tensor, heads, group, ffn):
    shape = replace(QWEN25_32B, heads=heads * group, kv_heads=heads, ffn=ffn)
    try:
        derive_layout(recipe(parallel={"tensor": tensor}), shape)
    except RequestError as error:
        proposed = str(error).splitlines()[0].rpartition("use ")[2].replace(" or ", ", ").split(", ")
        for size in map(int, proposed):
            assert derive_layout(recipe(parallel={"tensor": size}), shape).tensor == size
    else:
        assert heads * group % tensor == ffn % tensor == 0
        assert heads % tensor == 0 or tensor % heads == 0
