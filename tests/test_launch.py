"""What the launcher grants its ranks when one of them fails: small processes in the place of ranks."""

import os
import sys
import time

import pytest

from dapo_megatron import launch
from dapo_megatron.learner.manifest import checkpoint_under_way

# rank 1 fails once a checkpoint is under way; rank 0 gives it its name so many seconds later
RANK = """
import os, sys, time, pathlib
folder, seconds = pathlib.Path(sys.argv[1]) / "checkpoints", float(sys.argv[2])
growing = folder / ".step-000001.tmp"
if os.environ["RANK"] == "1":
    while not growing.exists():
        time.sleep(0.01)
    sys.exit(3)
growing.mkdir(parents=True)
time.sleep(seconds)
growing.rename(folder / "step-000001")
time.sleep(60)
"""


@pytest.mark.parametrize(("seconds", "limit_s", "whole"), [(1.5, 60.0, True), (30.0, 0.5, False)])
def test_a_failure_leaves_a_checkpoint_under_way_its_time(tmp_path, monkeypatch, capsys, seconds, limit_s, whole):
    monkeypatch.setattr(launch, "FAIL_GRACE_S", 0.3)
    started = time.monotonic()
    code = launch.start_ranks(
        [sys.executable, "-S", "-c", RANK, str(tmp_path), str(seconds)],
        2,
        save_limit_s=limit_s,
        saving=lambda: checkpoint_under_way(tmp_path),
    )
    assert code == 3 and "killing them" in capsys.readouterr().err
    assert os.listdir(tmp_path / "checkpoints") == ["step-000001" if whole else ".step-000001.tmp"]
    assert time.monotonic() - started < 25, "rank 0 was waited for although no checkpoint was under way any more"
