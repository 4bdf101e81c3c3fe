"""The engine's entry, with a stand-in for vLLM's server: its children die with it before any hook of vLLM's runs."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

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

if __name__ == "__main__":
    assert sys.argv[1:] == ["--port", "1"], sys.argv
    from vllm.entrypoints.openai.api_server import start
    start(1)
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="death signals are Linux's")
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
        text=True,
    )
    family = [psutil.Process(int(server.stdout.readline())) for _ in range(2)]
    server.kill()
    server.wait()
    server.stdout.close()
    left = psutil.wait_procs(family, timeout=10)[1]
    for process in left:
        process.kill()
    assert left == []
