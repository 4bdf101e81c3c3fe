"""The engine's entry, with a stand-in for vLLM's server: its children die with it before any hook of vLLM's runs."""

import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from dapo_megatron.rollout.vllm_server import PARENT
from tests.command_line import ROOT

SERVER = """
import multiprocessing, sys, time

def child(depth):
    print(multiprocessing.current_process().pid, flush=True)
    if depth:
        start(depth - 1)
    time.sleep(600)

def start(depth):
    multiprocessing.get_context("spawn").Process(target=child, args=(depth,)).start()

def nothing():
    pass

def forked():  # is the parent of what it spawns
    spawned = multiprocessing.get_context("spawn").Process(target=nothing)
    spawned.start()
    spawned.join()
    sys.exit(spawned.exitcode)

if __name__ == "__main__":
    assert sys.argv[1:] == ["--port", "1"], sys.argv
    from vllm.entrypoints.openai.api_server import forked, start
    process = multiprocessing.get_context("fork").Process(target=forked)
    process.start()
    process.join()
    assert process.exitcode == 0
    start(1)
    time.sleep(600)
"""

linux = pytest.mark.skipif(sys.platform != "linux", reason="death signals are Linux's")


@linux
@pytest.mark.parametrize("dead", [False, True])
def test_a_child_whose_server_is_dead_already_ends_at_once(dead: bool):
    code = "import runpy; runpy.run_module('dapo_megatron.rollout.vllm_server', run_name='__mp_main__')"
    parent = "1" if dead else str(os.getpid())
    environment = {**os.environ, "PYTHONPATH": str(ROOT), PARENT: parent}
    child = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60)
    assert child.returncode == int(dead)


@linux
def test_a_core_that_is_still_starting_dies_with_its_server_and_its_worker_with_it(tmp_path: Path):
    place = tmp_path / "vllm" / "entrypoints" / "openai"
    place.mkdir(parents=True)
    for folder in (place, *list(place.parents)[:2]):
        (folder / "__init__.py").touch()
    (place / "api_server.py").write_text(SERVER)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    server = subprocess.Popen(
        [sys.executable, "-m", "dapo_megatron.rollout.vllm_server", "--port", "1"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
    )
    family: list[psutil.Process] = []
    try:
        family = [psutil.Process(pid) for pid in numbers(server, count=2, time_limit_s=60)]
        server.kill()
        server.wait(10)
        assert psutil.wait_procs(family, timeout=10)[1] == []
    finally:
        if server.poll() is None:
            family += [child for child in psutil.Process(server.pid).children(recursive=True) if child not in family]
            server.kill()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        server.wait(10)
        server.stdout.close()


def numbers(server: subprocess.Popen, *, count: int, time_limit_s: float) -> list[int]:
    """So many lines with a number each, of what the server prints."""
    printed, end = b"", time.monotonic() + time_limit_s
    while printed.count(b"\n") < count:
        left = end - time.monotonic()
        assert left > 0 and select.select([server.stdout], [], [], left)[0], f"printed {printed!r} within the time"
        part = os.read(server.stdout.fileno(), 1 << 12)
        assert part, f"ended after {printed!r}"
        printed += part
    return [int(line) for line in printed.splitlines()[:count]]
