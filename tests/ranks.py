"""Worlds of real gloo ranks for tests: run a function on every rank, get rank 0's answer.

A world costs several seconds of imports, so a test function visits many layouts in one world.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from dapo_megatron.launch import free_port

ROOT = Path(__file__).parent.parent


def run_ranks(size: int, target: str, payload: dict[str, Any], *, time_limit_s: float = 800) -> Any:
    """Call `target` ("package.module:function") with `payload` on `size` ranks; returns rank 0's JSON-able result.

    Any rank that fails fails the test with its error output.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "payload.json").write_text(json.dumps(payload))
        logs = [open(Path(folder) / f"rank{rank}.log", "w+") for rank in range(size)]  # noqa: SIM115
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.ranks", target, folder],
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={
                    **os.environ,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(size),
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(port),
                    "OMP_NUM_THREADS": "1",
                    "TRANSFORMERS_VERBOSITY": "error",
                },
            )
            for rank, log in enumerate(logs)
        ]
        try:
            deadline = time.monotonic() + time_limit_s
            while any(p.poll() is None for p in processes):
                if time.monotonic() > deadline or any(p.returncode not in (None, 0) for p in processes):
                    break
                time.sleep(0.05)
        finally:
            late = [rank for rank, p in enumerate(processes) if p.poll() is None]
            for process in processes:
                process.kill()
                process.wait()
        failed = [rank for rank, p in enumerate(processes) if p.returncode != 0 and rank not in late] or late
        if failed:
            logs[failed[0]].seek(0)
            raise AssertionError(f"rank {failed[0]} of {target}:\n{logs[failed[0]].read()[-4000:]}")
        for log in logs:
            log.close()
        return json.loads((Path(folder) / "result.json").read_text())


def _main(target: str, folder: str) -> None:
    import torch

    from dapo_megatron.launch import world_from_environment
    from dapo_megatron.learner.distributed import join_world, leave_world

    torch.set_num_threads(1)
    world = world_from_environment()
    join_world(world, device=torch.device("cpu"), time_limit_s=120)
    module, function = target.split(":")
    result = getattr(import_module(module), function)(json.loads((Path(folder) / "payload.json").read_text()))
    if world.rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result))
    leave_world()


if __name__ == "__main__":
    _main(*sys.argv[1:])
