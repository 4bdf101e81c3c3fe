"""Waits for engines that start: they end on all ranks alike, soon after something ends them on one."""

import os
import signal
import subprocess
import time

import psutil
import pytest

from dapo_megatron.launch import free_port
from dapo_megatron.learner.manifest import list_checkpoints, read_state
from dapo_megatron.rollout.vllm_secret import VARIABLE
from tests.command_line import RECIPE, ROOT, SMALL, command, environment
from tests.ranks import run_ranks

SOON_S = 30.0  # half of the limit of these waits


@pytest.mark.distributed
def test_what_one_rank_learns_ends_the_wait_of_all(tmp_path):
    found = run_ranks(2, "tests.rollout.engine_start_cases:waits_that_end", {"logs": str(tmp_path)})
    for stopped, ended, rollout in found:
        assert stopped[:2] == rollout[:2] == ["Interrupted", True]
        assert ended[:2] == ["RunError", True] and "ended with code 0 while starting" in ended[2]
        assert max(stopped[3], ended[3], rollout[3]) < SOON_S


@pytest.mark.distributed
def test_a_signal_to_one_rank_while_engines_start_leaves_a_checkpoint(tmp_path):
    """The engine is somebody else's, and nobody has started it."""
    run, log = tmp_path / "run", tmp_path / "log"
    apart = ("rollout.placement=disaggregated", f'rollout.servers=["http://127.0.0.1:{free_port()}"]')
    world = ("parallel.tensor=2", "parallel.pipeline=1", "parallel.world=2")
    vllm = ("rollout.engine=vllm", "rollout.start_limit_s=300", *apart)
    with open(log, "w") as output:
        process = subprocess.Popen(
            command("train", RECIPE, f"run.directory={run}", *SMALL, *world, *vllm),
            cwd=ROOT, env={**environment(), VARIABLE: "theirs"}, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while "supervised 3/3" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        time.sleep(1)  # by now they wait; before it the signal would have been heeded, too
        ranks = {p.environ().get("RANK"): p for p in psutil.Process(process.pid).children()}
        os.kill(ranks["1"].pid, signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert "stopped at step 0; continue with --resume" in log.read_text() and "Traceback" not in log.read_text()
    (checkpoint,) = list_checkpoints(run / "checkpoints")
    assert read_state(checkpoint)["supervised_done"] == [3]
