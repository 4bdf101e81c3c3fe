"""Everything rests on this: the Megatron learner computes what transformers computes, however it is cut."""

import pytest

from tests.ranks import run_ranks
from tests.tiny_models import write_model

pytestmark = pytest.mark.distributed

LAYOUTS = {
    1: ["tp1pp1"],
    2: ["tp2pp1", "tp2pp1sp", "tp1pp2", "tp1pp2vpp2", "tp1pp1"],
    4: ["tp2pp2", "tp2pp2sp", "tp2pp2vpp2", "tp2pp2vpp2sp", "tp4pp1", "tp4pp1sp"],
}
MODELS = {
    "qwen2 untied": ("qwen2", False),
    "qwen2 tied": ("qwen2", True),
    "llama untied": ("llama", False),
    "llama tied": ("llama", True),
    "qwen3 untied": ("qwen3", False),
    "qwen3 tied": ("qwen3", True),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        name: str(write_model(root / name.replace(" ", "-"), family, tied=tied))
        for name, (family, tied) in MODELS.items()
    }


@pytest.mark.parametrize("world", LAYOUTS)
def test_logits_equal_transformers(models, world):
    gaps = run_ranks(world, "tests.learner.parity_cases:logit_gaps", {"models": models, "layouts": LAYOUTS[world]})
    assert len(gaps) == len(models) * len(LAYOUTS[world]) * 3
    too_far = {case: gap for case, gap in gaps.items() if not gap <= 1e-5}
    assert not too_far, too_far
