"""A skipped update leaves every bit of weights and optimizer as it was, on every rank, whatever the layout."""

import pytest

from tests.learner.batches import random_batch, save_batch
from tests.learner.test_checkpoint import SHAPES
from tests.ranks import run_ranks
from tests.tiny_models import write_model

CASES = [
    {"layout": "tp2pp2", "dtype": "bfloat16", "distributed": True, "offload": True},
    {"layout": "tp1pp2", "dtype": "bfloat16", "distributed": False},
    {"layout": "tp2pp1", "dtype": "float32", "distributed": True},
    {"layout": "tp1cp2pp1", "dtype": "bfloat16", "distributed": True},
    {"layout": "tp2pp1", "dtype": "bfloat16", "distributed": True, "critic": True},
]


@pytest.fixture(scope="module")
def payload(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("guard")
    return {
        "model": str(write_model(folder / "model", "qwen2", tied=True)),
        "batch": save_batch(random_batch(SHAPES, seed=7), folder / "batch.safetensors"),
    }


@pytest.mark.distributed
def test_skipped_updates_are_as_if_they_had_never_been(payload):
    found = run_ranks(4, "tests.learner.guard_cases:skipped_alike", payload | {"cases": CASES})
    assert len(found) == len(CASES)
    assert {case: wrong for case, wrong in found.items() if wrong} == {}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", ["tp1pp2", "tp2pp1"])
def test_logits_that_are_not_finite_skip_on_every_rank(payload, layout):
    told = run_ranks(2, "tests.learner.guard_cases:broken_logits", payload | {"layout": layout})
    assert (told["skipped"], told["after"]) == ("None", "True")
    assert "holds a NaN" in told["reason"], told
