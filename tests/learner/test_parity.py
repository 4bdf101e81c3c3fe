"""Everything rests on this: the Megatron learner computes what transformers computes, however it is cut."""

import pytest

from dapo_megatron.config.architecture import LLAMA3_ROPE
from tests.ranks import run_ranks
from tests.tiny_models import SHAPES, write_model

pytestmark = pytest.mark.distributed

HEAD_DIM = SHAPES["head_dim"]
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


def test_llama3_scaled_frequencies_are_those_of_transformers(tmp_path):
    """Fast ones stay, slow ones are divided by the factor, those between are blended."""
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, **LLAMA3_ROPE}
    folder = write_model(tmp_path / "scaled", "llama", tied=False, rope_parameters=rope, max_position_embeddings=65536)
    found = run_ranks(1, "tests.learner.parity_cases:rotary_frequencies", {"model": str(folder)})
    assert found["learner"] == pytest.approx(found["transformers"], rel=1e-6)
    unscaled = [5e5 ** (-2 * i / HEAD_DIM) for i in range(HEAD_DIM // 2)]
    shares = [scaled / plain for scaled, plain in zip(found["learner"], unscaled, strict=True)]
    assert shares[0] == pytest.approx(1) and shares[-1] == pytest.approx(1 / 8)
    assert any(0.13 < share < 0.99 for share in shares), shares
    assert found["gap"] <= 1e-5
