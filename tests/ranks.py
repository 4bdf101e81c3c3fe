"""Worlds of real gloo ranks for tests: run a function on every rank, get rank 0's answer.

Ranks are forked from one process that has imported torch, megatron-core and transformers: a world costs no imports.
"""

import json
import multiprocessing
import os
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from dapo_megatron.launch import free_port

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error", "MASTER_ADDR": "127.0.0.1"}
PRELOADED = ["transformers", "dapo_megatron.learner.learner", "dapo_megatron.learner.distributed"]


def run_ranks(
    size: int,
    target: str,
    payload: dict[str, Any],
    *,
    time_limit_s: float = 800,
    fresh: bool = False,
    collective_limit_s: float = 120,
) -> Any:
    """Call `target` ("package.module:function") with `payload` on `size` ranks; returns rank 0's JSON-able result.

    Any rank that fails fails the test with its error output. `fresh`: ranks import everything themselves, in the
    present environment. `collective_limit_s`: the longest that a rank waits for the others.
    """
    port = free_port()
    context = multiprocessing.get_context("spawn" if fresh else "forkserver")
    if not fresh:
        context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "payload.json").write_text(json.dumps(payload))
        processes = [
            context.Process(target=_rank, args=(target, folder, rank, size, port, collective_limit_s))
            for rank in range(size)
        ]
        before = {key: os.environ.get(key) for key in ENVIRONMENT}
        os.environ.update(ENVIRONMENT)  # the forking process is started by the first of them
        try:
            for process in processes:
                process.start()
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
        try:
            deadline = time.monotonic() + time_limit_s
            while any(p.is_alive() for p in processes):
                if time.monotonic() > deadline or any(p.exitcode not in (None, 0) for p in processes):
                    break
                time.sleep(0.05)
        finally:
            late = [rank for rank, p in enumerate(processes) if p.is_alive()]
            for process in processes:
                process.kill()
                process.join()
        failed = [rank for rank, p in enumerate(processes) if p.exitcode != 0 and rank not in late] or late
        if failed:
            log = (folder / f"rank{failed[0]}.log").read_text(errors="replace")
            raise AssertionError(f"rank {failed[0]} of {target}:\n{log[-4000:]}")
        return json.loads((folder / "result.json").read_text())


def _rank(target: str, folder: Path, rank: int, size: int, port: int, limit_s: float) -> None:
    log = os.open(folder / f"rank{rank}.log", os.O_CREAT | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(ROOT)
    os.environ.update(ENVIRONMENT, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_PORT=str(port))
    import torch

    from dapo_megatron.launch import world_from_environment
    from dapo_megatron.learner.distributed import join_world, leave_world

    torch.set_num_threads(1)
    join_world(world_from_environment(), device=torch.device("cpu"), time_limit_s=limit_s)
    module, function = target.split(":")
    result = getattr(import_module(module), function)(json.loads((folder / "payload.json").read_text()))
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(result))
    leave_world()
