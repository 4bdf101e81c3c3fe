"""Optimizer state that leaves the device between updates changes no bit of them."""

import pytest

from tests.learner.batches import random_batch, save_batch
from tests.learner.test_checkpoint import SHAPES
from tests.ranks import run_ranks
from tests.tiny_models import write_model


@pytest.mark.distributed
def test_updates_with_the_optimizer_away_in_between_are_the_same_bits(tmp_path):
    payload = {
        "model": str(write_model(tmp_path / "model", "qwen2", tied=True)),
        "batch": save_batch(random_batch(SHAPES, seed=7), tmp_path / "batch.safetensors"),
        "layout": "tp1pp1",  # two data-parallel ranks share the optimizer's state
        "out": str(tmp_path),
    }
    found = run_ranks(2, "tests.learner.offload_cases:away_between_updates", payload)
    assert len(found) == 3
    assert [(name, what) for name, held in found.items() for what, is_so in held.items() if not is_so] == []
