"""The demo's claim, on one seed: held-out accuracy rises by reinforcement learning on a TP 2 x PP 2 learner."""

import json

import pytest

from tests.command_line import RECIPE, run_command

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def test_accuracy_rises(tmp_path):
    run = tmp_path / "run"
    result = run_command("train", RECIPE, f"run.directory={run}", "run.seed=3", time_limit_s=1200)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["step"] == 0 and lines[0]["validation/accuracy"] <= 0.55
    assert lines[-1]["step"] == 40
    assert lines[-1]["validation/accuracy"] >= 0.80
    assert lines[-1]["validation/accuracy_greedy"] >= 0.90
    # what is neither rollout, learning nor resharding
    other = sum(x["time/step"] - x["time/rollout"] - x["time/learn"] - x["time/reshard"] for x in lines[1:])
    assert other <= 0.05 * sum(x["time/step"] for x in lines[1:])
