"""A job on a real slurm: started, told of its time limit by slurm itself, checkpointed, queued again, finished."""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dapo_megatron.cli import app
from dapo_megatron.monitoring.metrics import read_metrics
from tests.command_line import ROOT, SMALL
from tests.slurm.real_slurm import Slurm, missing, running_slurm

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(missing()), reason="slurm's programs are not installed")]

STEPS = 20
# slow until the run was stopped once, so that the notice finds it in the middle, however fast the machine is
SLOW_REWARD = """
import pathlib, time

def score(responses, answers, prompts):
    if not set(pathlib.Path({checkpoints!r}).glob("step-*")) - set(pathlib.Path({checkpoints!r}).glob("step-000000")):
        time.sleep(6)
    return [float(len(response) % 3) for response in responses]
"""


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        with running_slurm(folder) as running:
            yield running
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_a_run_is_told_of_its_time_limit_requeued_and_finished(slurm, tmp_path, monkeypatch):
    reward, run = tmp_path / "reward.py", tmp_path / "run"
    reward.write_text(SLOW_REWARD.format(checkpoints=str(run / "checkpoints")))
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    settings = [
        *SMALL,
        f"run.directory={run}",
        f"run.steps={STEPS}",
        "evaluation.every=0",
        "checkpoint.every=100",
        "checkpoint.hugging_face=false",
        "monitoring.report=false",
        f"reward.custom={reward}:score",
        "reward.time_limit_s=60",
        "slurm.time_limit='00:03:00'",
        "slurm.stop_before_s=90",
    ]
    told = CliRunner().invoke(app, ["submit", "recipes/slurm/tiny.yaml", *settings])
    assert told.exit_code == 0, told.output
    job = re.search(r"Submitted batch job (\d+)", told.output)[1]
    state = slurm.wait(job, 420)
    folder = Path(f"{run}.slurm")
    log = (folder / f"{job}.out").read_text()
    ranks = [path.read_text() for path in sorted(folder.glob(f"{job}-rank-*.log"))]
    whole = log + "\n".join(ranks) + slurm.logs()
    assert state == "COMPLETED" and len(ranks) == 4, whole
    order = [
        "health: ",
        "output in",
        "the time limit is near",
        "queued again",
        "--resume, output in",
        "ends with code 0",
    ]
    places = [log.find(words) for words in order]
    assert -1 not in places and places == sorted(places), whole
    stopped = re.findall(r"stopped at step (\d+); continue with --resume", ranks[0])
    resumed = re.findall(r"resumed from \S+/step-(\d+)", ranks[0])
    assert stopped and resumed and int(stopped[-1]) == int(resumed[-1]), whole
    assert 0 < int(stopped[-1]) < STEPS
    assert [metrics["step"] for metrics in read_metrics(run / "metrics.jsonl")] == list(range(STEPS + 1))
    assert "Traceback" not in whole
