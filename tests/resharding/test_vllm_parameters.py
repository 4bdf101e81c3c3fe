"""The layout of a worker against vLLM itself: names, shapes, and where its own loader puts every element."""

import pytest

from tests.ranks import run_ranks
from tests.tiny_models import write_model

pytest.importorskip("vllm")

HEADS_OF_32 = {"hidden_size": 128, "head_dim": 32, "num_hidden_layers": 2}
HEADS_OF_64 = {"hidden_size": 128, "head_dim": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
MODELS = {
    "qwen2": ("qwen2", False, HEADS_OF_32),
    "qwen2 tied": ("qwen2", True, HEADS_OF_32),
    "qwen2 64": ("qwen2", False, {**HEADS_OF_64, "vocab_size": 130}),
    "qwen2 one kv head": ("qwen2", False, {**HEADS_OF_32, "num_key_value_heads": 1}),
    "llama": ("llama", False, HEADS_OF_32),
    "llama wide heads": ("llama", True, {**HEADS_OF_64, "hidden_size": 96}),
    "qwen3": ("qwen3", False, HEADS_OF_32),
    "qwen3 tied": ("qwen3", True, {**HEADS_OF_64, "num_attention_heads": 4, "num_key_value_heads": 1}),
}


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_workers_parameters_are_those_of_the_layout(tmp_path, tensor):
    folders = [
        str(write_model(tmp_path / name, family, tied=tied, **changes))
        for name, (family, tied, changes) in MODELS.items()
    ]
    found = run_ranks(tensor, "tests.resharding.vllm_cases:compare", {"folders": folders}, time_limit_s=600)
    assert dict(zip(MODELS, found, strict=True)) == {name: [] for name in MODELS}
