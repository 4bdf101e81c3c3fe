"""Starting engines: what they are told, who may speak to them, and that they end; with stand-ins for vLLM's server."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.rollout import launcher, vllm_plugin
from dapo_megatron.rollout.launcher import (
    EngineProcess,
    EngineSettings,
    RunningEngine,
    engine_command,
    engine_environment,
    wait_until_ready,
)
from dapo_megatron.rollout.vllm_secret import HEADER, VARIABLE, RequireSecret, make_secret

SERVER = """
import http.server, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        right = self.headers["x-engine-secret"] == os.environ["DAPO_MEGATRON_ENGINE_SECRET"]
        self.send_response(200 if right else 401); self.end_headers()
    def log_message(self, *a): pass
http.server.HTTPServer((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
"""


def settings(**changes: object) -> EngineSettings:
    given = {"model": Path("/model"), "dtype": "float32", "tensor": 1, "max_model_len": 64, "max_sequences": 8}
    return EngineSettings(**{**given, **changes})


@pytest.fixture
def stand_in(monkeypatch):
    """Engines are a small Python server, or whatever `code` says."""

    def use(code: str = SERVER) -> None:
        monkeypatch.setattr(
            launcher, "engine_command", lambda _s, host, port: [sys.executable, "-c", code, host, str(port)]
        )

    return use


def test_the_secret_is_in_the_environment_and_not_on_the_command_line():
    environment = engine_environment(settings(), "geheim", {"RANK": "3", "MASTER_PORT": "1", "PATH": "/bin"})
    assert environment[VARIABLE] == "geheim" and environment["PATH"] == "/bin"
    assert not {"RANK", "MASTER_PORT", "VLLM_PLUGINS", "PYTHONDONTWRITEBYTECODE"} & environment.keys()
    assert "geheim" not in " ".join(engine_command(settings(), "127.0.0.1", 80))


@pytest.mark.parametrize(
    ("changes", "present", "absent"),
    [
        (
            {},
            ["--enforce-eager", "uni", "--no-enable-chunked-prefill"],
            ["--enable-sleep-mode", "--gpu-memory-utilization"],
        ),
        ({"tensor": 2}, ["--enforce-eager", "mp"], []),
        ({"devices": ("0", "1"), "tensor": 2, "sleep": True}, ["--enable-sleep-mode", "0.85"], ["--enforce-eager"]),
        ({"devices": ("4",)}, ["--gpu-memory-utilization"], ["--enable-sleep-mode", "--no-enable-chunked-prefill"]),
    ],
)
def test_the_command_fits_the_device(changes, present, absent):
    command = engine_command(settings(**changes), "127.0.0.1", 8123)
    assert all(word in command for word in [*present, "8123", "processed_logprobs", "dummy", "--enable-prefix-caching"])
    assert not any(word in command for word in absent)


def test_an_engine_sees_the_gpus_it_is_given():
    environment = engine_environment(settings(devices=("4", "GPU-5f")), "s", {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4"})
    assert environment["CUDA_VISIBLE_DEVICES"] == "4,GPU-5f"


def test_an_engine_starts_answers_and_ends_with_all_its_children(stand_in, tmp_path):
    stand_in()
    engine = EngineProcess(settings(), secret="s", log=tmp_path / "logs" / "engine.log")
    wait_until_ready([engine], 30)
    family = [psutil.Process(engine.pid), *psutil.Process(engine.pid).children(recursive=True)]
    assert len(family) == 2 and engine.exit_code() is None
    engine.stop()
    assert psutil.wait_procs(family, timeout=5)[1] == []
    assert engine.exit_code() is not None


def test_an_engine_of_somebody_else_must_know_the_secret(stand_in, tmp_path):
    stand_in()
    engine = EngineProcess(settings(), secret="s", log=tmp_path / "engine.log")
    wait_until_ready([engine], 30)
    wait_until_ready([RunningEngine(engine.address + "/", "s")], 5)
    with pytest.raises(RunError, match=f"(?s){engine.address} was started with another secret.*{VARIABLE}"):
        wait_until_ready([RunningEngine(engine.address, "wrong")], 30)
    engine.stop()
    with pytest.raises(RunError, match=r"not ready within rollout\.start_limit_s=0.*rollout\.servers"):
        wait_until_ready([RunningEngine(engine.address, "s")], 0)


def test_an_engine_that_ends_while_starting_shows_the_end_of_its_log(stand_in, tmp_path):
    stand_in("print('no such model'); raise SystemExit(0)")
    engine = EngineProcess(settings(), secret="s", log=tmp_path / "engine.log")
    with pytest.raises(RunError, match=r"(?s)ended with code 0 while starting.*no such model"):
        wait_until_ready([engine], 30)
    engine.stop()


def test_an_engine_that_never_answers_is_given_up(stand_in, tmp_path):
    stand_in("import time; time.sleep(60)")
    engine = EngineProcess(settings(), secret="s", log=tmp_path / "engine.log")
    with pytest.raises(RunError, match=r"not ready within rollout\.start_limit_s=1"):
        wait_until_ready([engine], 1)
    engine.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="death signals are Linux's")
def test_an_engine_dies_with_its_learner(tmp_path):
    code = f"""
import sys, time
from pathlib import Path
from dapo_megatron.rollout import launcher
launcher.engine_command = lambda *_: [sys.executable, "-c", "import time; time.sleep(600)"]
engine = launcher.EngineProcess(launcher.EngineSettings(Path("/m"), "float32", 1, 64, 8), secret="s",
                                log=Path({str(tmp_path / "log")!r}))
print(engine.pid, flush=True)
time.sleep(600)
"""
    learner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    engine = psutil.Process(int(learner.stdout.readline()))
    learner.kill()
    learner.wait()
    assert psutil.wait_procs([engine], timeout=5)[1] == []


def call_with(headers: list[tuple[bytes, bytes]], kind: str = "http") -> list[dict]:
    sent: list[dict] = []

    async def app(scope, receive, send):
        await send({"type": "passed"})

    async def send(message):
        sent.append(message)

    asyncio.run(RequireSecret(app)({"type": kind, "headers": headers}, None, send))
    return sent


def test_whoever_lacks_the_secret_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "geheim")
    name = HEADER.encode()
    assert call_with([(name, b"geheim")]) == [{"type": "passed"}]
    for headers in ([], [(name, b"")], [(name, b"geheiM")], [(b"authorization", b"geheim")]):
        assert call_with(headers)[0]["status"] == 401
        assert call_with(headers, "websocket") == [{"type": "websocket.close", "code": 1008}]
    assert call_with([], "lifespan") == [{"type": "passed"}]


def test_a_server_without_a_secret_does_not_start(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(RuntimeError, match="without a secret"):
        RequireSecret(lambda *_: None)


def test_every_run_has_a_secret_of_its_own_unless_one_is_given(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert len({make_secret() for _ in range(5)}) == 5 and len(make_secret()) >= 32
    monkeypatch.setenv(VARIABLE, "theirs")
    assert make_secret() == "theirs"


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (None, "not installed"),
        ("0.31.2", "0.31.2 is installed"),
        ("0.33.0", "0.33.0 is installed"),
        ("0.32.5+cpu", None),
    ],
)
def test_only_tested_versions_of_vllm_are_used(monkeypatch, found, told):
    monkeypatch.setattr(vllm_plugin, "vllm_version", lambda: found)
    if told is None:
        vllm_plugin.check_vllm_version()
        return
    with pytest.raises(RequestError, match=told):
        vllm_plugin.check_vllm_version()


def test_the_plugin_leaves_foreign_vllm_processes_alone(monkeypatch):
    monkeypatch.delenv(vllm_plugin.ENGINE_MARK, raising=False)
    monkeypatch.setattr(vllm_plugin, "check_vllm_version", lambda: pytest.fail("touched"))
    vllm_plugin.register()


def test_vllm_finds_the_plugin():
    from importlib.metadata import entry_points

    found = [point for point in entry_points(group="vllm.general_plugins") if point.name == "dapo_megatron"]
    assert [point.load() for point in found] == [vllm_plugin.register]


def test_serve_refuses_to_run_without_a_secret():
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    done = subprocess.run(
        [sys.executable, "-m", "dapo_megatron.cli", "serve", "recipes/tiny-arithmetic-cpu.yaml", "rollout.engine=vllm"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert done.returncode == 2 and VARIABLE in done.stderr and "Traceback" not in done.stderr
