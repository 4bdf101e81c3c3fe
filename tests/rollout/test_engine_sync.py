"""A learner at TP 2 × PP 2 trains, and real vLLM computes with exactly its weights."""

import pytest

from tests.ranks import run_ranks
from tests.rollout.served import START_LIMIT_S, write_models

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.distributed]


@pytest.mark.parametrize(("engines", "tensor", "transport", "kill"), [(2, 1, "relay", True), (1, 2, "group", False)])
def test_after_training_vllm_computes_with_the_learners_weights(tmp_path, engines, tensor, transport, kill):
    model = write_models(tmp_path / "model", 1)[0]
    payload = {
        "model": str(model), "scratch": str(tmp_path), "engines": engines, "tensor": tensor, "transport": transport,
        "kill": kill,
    }  # fmt: skip
    found = run_ranks(
        4, "tests.rollout.engine_sync_cases:trained_weights", payload, time_limit_s=800,
        collective_limit_s=START_LIMIT_S,
    )  # fmt: skip
    assert found["moved"], "training moved every weight"
    assert found["greedy"] == [16, 16]
    assert max(found["gaps"]) <= 2e-5
    assert found["bytes"] == [found["minimum"]] * 2
    for passed in found["collectives"]:  # ranks tell each other how it went, which is small; no weight takes that way
        assert 0 < sum(passed.values()) < found["minimum"] / 20, passed
    assert found["versions"] == [[0], [1], [3]]
    # rank 2 is tensor rank 0 of the second stage, whose local layer 1 is layer 3
    assert "model.layers.3.mlp.down_proj.weight" in found["told"] and "from rank 2" in found["told"]
    if kill:  # an engine that is started anew gets the same weights again
        assert all(found["anew"]) and found["restarts left"] == 0
