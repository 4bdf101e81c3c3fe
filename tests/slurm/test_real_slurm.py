"""A job on a real slurm: started, told of its time limit by slurm itself, checkpointed, queued again, finished."""

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dapo_megatron.cli import app
from dapo_megatron.monitoring.metrics import read_metrics
from tests.command_line import ROOT, SMALL
from tests.slurm.real_slurm import Slurm, missing, running_slurm

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(missing()), reason="slurm's programs are not installed")]

STEPS = 30
# slow until the run was stopped once, so that the notice finds it in the middle, however fast the machine is
SLOW_REWARD = """
import pathlib, time

def score(responses, answers, prompts):
    if not set(pathlib.Path({checkpoints!r}).glob("step-*")) - set(pathlib.Path({checkpoints!r}).glob("step-000000")):
        time.sleep(9)
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


@pytest.fixture
def submit(slurm, tmp_path, monkeypatch) -> Callable[..., tuple[str, str, Path]]:
    """Submit the tiny recipe; returns the job, its final state and the folder of its logs."""
    monkeypatch.chdir(ROOT)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", slurm.environment["SLURM_CONF"])
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")

    def call(*settings: str, limit_s: float) -> tuple[str, str, Path]:
        arguments = ["recipes/slurm/tiny.yaml", *SMALL, f"run.directory={tmp_path / 'run'}", *settings]
        told = CliRunner().invoke(app, ["submit", *arguments])
        assert told.exit_code == 0, told.output
        job = re.search(r"Submitted batch job (\d+)", told.output)[1]
        return job, slurm.wait(job, limit_s), tmp_path / "run.slurm"

    return call


def test_a_node_that_is_not_fit_ends_the_job_before_the_run(submit, tmp_path):
    job, state, folder = submit("slurm.least_disk_gb=1e9", limit_s=240)
    log = (folder / f"{job}.out").read_text()
    assert state == "FAILED", log
    assert "health: " in log and log.count("below slurm.least_disk_gb=1e+09") == 1 and "ends with code 1\n" in log
    assert not (tmp_path / "run").exists() and not list(folder.glob("*rank*"))


def test_a_run_is_told_of_its_time_limit_requeued_and_finished(slurm, submit, tmp_path):
    reward, run = tmp_path / "reward.py", tmp_path / "run"
    reward.write_text(SLOW_REWARD.format(checkpoints=str(run / "checkpoints")))
    job, state, folder = submit(
        f"run.steps={STEPS}",
        "evaluation.every=0",
        "checkpoint.every=100",
        "checkpoint.hugging_face=false",
        "monitoring.report=false",
        f"reward.custom={reward}:score",
        "reward.time_limit_s=60",
        "slurm.health_check=false",  # the test above; the notice comes no earlier than 120 s after the start
        "slurm.time_limit='00:05:00'",
        "slurm.stop_before_s=90",
        limit_s=660,
    )
    log = (folder / f"{job}.out").read_text()
    ranks = [path.read_text() for path in sorted(folder.glob(f"{job}-rank-*.log"))]
    whole = log + "\n".join(ranks) + slurm.logs()
    assert state == "COMPLETED" and len(ranks) == 4, whole
    order = [
        "parity on the first node",
        "output in",
        "the time limit is near",
        "queued again",
        "parity: these nodes have passed in this job",
        "--resume, output in",
        "ends with code 0",
    ]
    places = [log.find(words) for words in order]
    assert -1 not in places and places == sorted(places), whole
    verdict = json.loads((folder / f"{job}-parity.json").read_text())
    assert verdict["passed"] and {part["part"]: part["outcome"] for part in verdict["parts"]}["reshard"] == "passed"
    stopped = re.findall(r"stopped at step (\d+); continue with --resume", ranks[0])
    resumed = re.findall(r"resumed from \S+/step-(\d+)", ranks[0])
    assert stopped and resumed and int(stopped[-1]) == int(resumed[-1]), whole
    assert 0 < int(stopped[-1]) < STEPS
    assert [metrics["step"] for metrics in read_metrics(run / "metrics.jsonl")] == list(range(STEPS + 1))
    assert "Traceback" not in whole
