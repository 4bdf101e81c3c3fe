"""Runs whose vLLM engines are killed or frozen: they go on with new engines, or stop and can be resumed; nothing hangs
and nothing is left running.

The embedded engine cannot be imported in any of these runs.
"""

import json
import os
import secrets
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest

from dapo_megatron.launch import free_port
from dapo_megatron.rollout.launcher import RunningEngine
from dapo_megatron.rollout.vllm_secret import HEADER, VARIABLE
from tests.command_line import RECIPE, ROOT, SMALL, command, environment

pytest.importorskip("vllm")
pytestmark = pytest.mark.distributed

LIMIT_S = 500.0
# 64 responses of up to 100 tokens, four at a time: rollouts that last
VLLM = (
    *SMALL,
    "rollout.engine=vllm",
    "rollout.prompts_per_step=8",
    "rollout.samples_per_prompt=8",
    "rollout.max_response_length=100",
    "rollout.max_batch_sequences=4",
    "rollout.time_limit_s=300",
    "algorithm.mini_batch_prompts=4",
    "reward.overlong.max_length=100",  # a random model answers nothing right: length tells responses apart
    "reward.overlong.cache_length=99",
    "evaluation.every=0",
    "checkpoint.every=100",
    "monitoring.report=false",
    "resharding.time_limit_s=20",
    "resharding.verify=always",
    "run.steps=3",
)
NO_HF_ENGINE = "import sys\nsys.modules['dapo_megatron.rollout.hf_engine'] = None\n"


@dataclass
class Run:
    """A run under way. Its secret is in the environment of each of its processes, and of no others; vLLM's children
    write their titles over their environment and are known by their process groups."""

    folder: Path
    secret: str
    process: subprocess.Popen
    log: Path
    groups: set[int] = field(default_factory=set)

    def output(self) -> str:
        return self.log.read_text()

    def metrics(self) -> list[dict]:
        path = self.folder / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def processes(self) -> list[psutil.Process]:
        """All processes of the run that still run."""
        group_of: dict[psutil.Process, int] = {}
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE:
                    group_of[process] = os.getpgid(process.pid)
                    if process.environ().get(VARIABLE) == self.secret:
                        self.groups.add(group_of[process])
            except (OSError, psutil.Error):
                continue
        return [process for process, group in group_of.items() if group in self.groups]

    def server(self) -> psutil.Process:
        return next(p for p in self.processes() if "dapo_megatron.rollout.vllm_server" in p.cmdline())

    def workers(self) -> list[psutil.Process]:
        return [p for p in self.processes() if any(word.startswith("VLLM::Worker") for word in p.cmdline())]

    def requests_running(self) -> int:
        """How many requests the engine works on; 0 while there is none that answers."""
        try:
            words = self.server().cmdline()
            port = words[words.index("--port") + 1]
            request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={HEADER: self.secret})
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=5) as response:
                lines = response.read().decode().splitlines()
        except (OSError, StopIteration, psutil.Error):
            return 0
        return sum(int(float(line.split()[-1])) for line in lines if line.startswith("vllm:num_requests_running"))

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not condition():
            assert self.process.poll() is None, f"ended before {what}:\n{self.output()}"
            assert time.monotonic() < deadline, f"not {what} in time:\n{self.output()}"
            time.sleep(0.05)

    def until_mid_rollout(self) -> None:
        """Return when the first step is over and the engine works on the second one's requests."""
        self.wait_for(lambda: any(line["step"] >= 1 for line in self.metrics()), "through its first step")
        self.wait_for(lambda: self.requests_running() > 0, "sampling")

    def finish(self) -> int:
        return self.process.wait(LIMIT_S)

    def nothing_left(self, within_s: float = 10.0) -> bool:
        deadline = time.monotonic() + within_s
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.processes()


@contextmanager
def started(folder: Path, *arguments: str) -> Iterator[Run]:
    """`dapo-megatron train` with engines; whatever is left of it is killed in the end."""
    stub = folder.parent / "stub"
    stub.mkdir(exist_ok=True)
    (stub / "sitecustomize.py").write_text(NO_HF_ENGINE)
    secret, log = secrets.token_hex(16), folder.with_suffix(".log")
    with open(log, "a") as output:
        process = subprocess.Popen(
            command("train", RECIPE, f"run.directory={folder}", *VLLM, *arguments),
            cwd=ROOT,
            env={**environment(), VARIABLE: secret, "PYTHONPATH": str(stub)},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    run = Run(folder, secret, process, log)
    try:
        yield run
    finally:
        process.kill()
        process.wait()
        for left in run.processes():
            left.kill()


def check_finished(run: Run, steps: int) -> None:
    check_steps(run, steps)
    assert run.nothing_left(), run.processes()


def check_steps(run: Run, steps: int) -> None:
    assert run.finish() == 0, run.output()
    assert [line["step"] for line in run.metrics() if line["step"]] == list(range(1, steps + 1))
    gaps = [line["mismatch/logprob_abs_mean"] for line in run.metrics() if line["step"]]
    assert max(gaps) < 1e-5, gaps
    assert "Traceback" not in run.output()


@contextmanager
def serving(run: Run, port: int) -> Iterator[subprocess.Popen]:
    """`dapo-megatron serve` for a run that has laid out its model."""
    with open(run.folder.with_suffix(".server.log"), "w") as output:
        server = subprocess.Popen(
            command("serve", RECIPE, f"run.directory={run.folder}", *VLLM, "--port", port),
            cwd=ROOT,
            env={**environment(), VARIABLE: run.secret},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield server
    finally:
        server.terminate()
        server.wait(30)


@pytest.mark.slow
def test_a_run_with_vllm_needs_no_embedded_engine(tmp_path):
    """Its engine is one that somebody else has started, and outlives it."""
    folder, port = tmp_path / "run", free_port()
    apart = ("rollout.placement=disaggregated", f'rollout.servers=["http://127.0.0.1:{port}"]')
    with started(folder, "run.steps=2", *apart) as run:
        run.wait_for((folder / "model" / "config.json").is_file, "laid out")
        with serving(run, port) as server:
            check_steps(run, 2)
            assert not (folder / "engines").exists(), "the run starts none"
            assert server.poll() is None and RunningEngine(f"http://127.0.0.1:{port}", run.secret).answers()
        assert run.nothing_left(), run.processes()
    trained = [line for line in run.metrics() if line.get("tokens/trained")]
    assert trained and all(line["resharding/bytes_sent"] > 0 for line in trained)
    with started(tmp_path / "other", "run.steps=2", "rollout.engine=hf") as run:
        assert run.finish() != 0
        assert "hf_engine" in run.output()


@pytest.mark.slow
def test_a_killed_server_is_replaced_in_mid_rollout(tmp_path):
    with started(tmp_path / "run") as run:
        run.until_mid_rollout()
        killed = run.server().pid
        assert any(p.cmdline()[0].startswith("VLLM::EngineCore") for p in run.processes())
        os.kill(killed, signal.SIGKILL)
        check_finished(run, 3)
    assert run.output().count("restarting engine 0") == 1
    assert "engine http://127.0.0.1:" in run.output()


@pytest.mark.slow
def test_a_killed_worker_is_replaced_in_mid_rollout(tmp_path):
    with started(tmp_path / "run", "rollout.tensor=2") as run:
        run.until_mid_rollout()
        assert len(run.workers()) == 2
        run.workers()[1].kill()
        check_finished(run, 3)
    assert run.output().count("restarting engine 0") == 1


@pytest.mark.slow
@pytest.mark.parametrize("end", ["killed", "frozen"])
def test_a_worker_that_fails_in_mid_transfer_is_replaced(tmp_path, end):
    """It is stopped while the learner learns, so the next transfer waits for it; then it is killed, or stays."""
    with started(tmp_path / "run", "rollout.tensor=2", "resharding.transport=group") as run:
        run.until_mid_rollout()
        run.wait_for(lambda: run.requests_running() == 0, "through its second rollout")
        worker = run.workers()[1]
        worker.suspend()
        if end == "killed":
            time.sleep(6)  # by now the learner's ranks send
            worker.kill()
        check_finished(run, 3)
    assert run.output().count("restarting engine 0") == 1


@pytest.mark.slow
def test_without_restarts_a_run_stops_with_a_checkpoint_and_can_be_resumed(tmp_path):
    folder = tmp_path / "run"
    with started(folder, "rollout.restarts=0") as run:
        run.until_mid_rollout()
        run.server().kill()
        assert run.finish() == 1, run.output()
        output = run.output()
        assert "rollout: engine http://127.0.0.1:" in output and "rollout.restarts" in output
        assert "--resume" in output and "Traceback" not in output
        assert run.nothing_left(), run.processes()
        step = run.metrics()[-1]["step"]
        assert 1 <= step < 3
        # after the warm start, and where it stopped
        found = sorted(p.name for p in (folder / "checkpoints").iterdir())
        assert found == ["step-000000", f"step-{step:06d}"]
        state = json.loads((folder / "checkpoints" / f"step-{step:06d}" / "state.json").read_text())
        # the prompts of the step that failed come again
        assert state["step"] == step and state["prompt_order"]["position"] == 8 * step
    with started(folder, "run.steps=1000", "--resume") as run:
        run.wait_for(lambda: run.metrics()[-1]["step"] > step, "on its way again")
        assert f"resumed from {folder / 'checkpoints' / f'step-{step:06d}'}" in run.output()
        assert [line["step"] for line in run.metrics()] == list(range(run.metrics()[-1]["step"] + 1))
        # and a learner that is killed as a whole leaves no engine behind
        assert len(run.processes()) >= 1 + 4 + 2, "the launcher, its ranks, the server and its engine"
        run.process.kill()
        assert run.nothing_left(10.0), run.processes()
