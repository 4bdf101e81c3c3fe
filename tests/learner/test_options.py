"""Recomputation changes nothing, bf16 trains with fp32 main gradients and weights, masked batches give zero."""

import pytest

from tests.learner.batches import random_batch, save_batch
from tests.ranks import run_ranks
from tests.tiny_models import write_model

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def payload(tmp_path_factory):
    root = tmp_path_factory.mktemp("options")
    batch = random_batch([(4, 20), (7, 31), (3, 12), (9, 40)], seed=11)
    model = write_model(root / "model", "qwen2", tied=False)
    return {"model": str(model), "batch": save_batch(batch, root / "batch.safetensors")}


@pytest.mark.parametrize("world, layout", [(1, "tp1pp1"), (4, "tp2pp2vpp2sp")])
def test_recomputation_gives_the_same_gradient(payload, world, layout):
    gaps = run_ranks(world, "tests.learner.option_cases:recomputation_gaps", {**payload, "layout": layout})
    assert set(gaps) == {"none", "selective", "full"}
    assert all(gap <= 1e-6 for gap in gaps.values()), gaps


def test_bf16_trains_with_fp32_main_gradients_and_weights(payload):
    result = run_ranks(4, "tests.learner.option_cases:train_in_bf16", {**payload, "layout": "tp2pp2"})
    assert result["bf16 dtypes"] == [["torch.bfloat16"], ["torch.float32"], ["torch.float32"]]
    assert result["fp32 dtypes"] == [["torch.float32"]] * 3
    assert result["fp32"][-1] < 0.5 * result["fp32"][0]
    for half, single in zip(result["bf16"], result["fp32"], strict=True):
        assert half == pytest.approx(single, rel=0.05)


def test_bf16_logits_stay_bf16(payload):
    found = run_ranks(1, "tests.learner.option_cases:logits_dtype", {**payload, "layout": "tp1pp1"})
    assert found == "torch.bfloat16"


@pytest.mark.parametrize("world, layout", [(1, "tp1pp1"), (2, "tp2pp1sp")])
def test_a_masked_mini_batch_has_no_loss_and_no_gradient(payload, world, layout):
    loss, gradient = run_ranks(world, "tests.learner.option_cases:nothing_to_train", {**payload, "layout": layout})
    assert loss == 0.0 and gradient == 0.0
