"""Places of a bridge for tests: processes that know no common world, only a store; some may be killed on the way."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """How a place ended: its exit status (−9: killed) and what it returned (None: nothing)."""

    status: int
    result: Any


def run_places(count: int, target: str, payload: dict[str, Any], *, time_limit_s: float = 180) -> list[Outcome]:
    """Call `target` ("package.module:function") with (store, place, payload) in `count` processes at once.

    A place that raises, or still runs after the time limit, fails the test. The store lives here, so that no place's
    end ends it.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "payload.json").write_text(json.dumps(payload))
        nursery = subprocess.Popen(
            [sys.executable, "-m", "tests.resharding.places", target, folder, str(count), str(store.port)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            with suppress(subprocess.TimeoutExpired):
                nursery.wait(time_limit_s)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(nursery.pid, signal.SIGKILL)
            nursery.wait()
        return [_outcome(Path(folder), target, place) for place in range(count)]


def _outcome(folder: Path, target: str, place: int) -> Outcome:
    status, result, log = (folder / f"{place}.{kind}" for kind in ("status", "json", "log"))
    output = log.read_text()[-4000:] if log.exists() else ""
    assert status.exists(), f"place {place} of {target} was still running at the time limit:\n{output}"
    found = int(status.read_text())
    assert found in (0, -9), f"place {place} of {target} failed:\n{output}"
    return Outcome(found, json.loads(result.read_text()) if result.exists() else None)


def _main(target: str, folder: str, count: str, port: str) -> None:
    """Import once, fork the places, note how each ends."""
    torch.set_num_threads(1)
    module, name = target.split(":")
    function = getattr(import_module(module), name)
    places = {}
    for place in range(int(count)):
        pid = os.fork()
        if pid == 0:
            _place(function, Path(folder), place, int(port))
        places[pid] = place
    while places:
        pid, status = os.wait()
        (Path(folder) / f"{places.pop(pid)}.status").write_text(str(os.waitstatus_to_exitcode(status)))


def _place(function: Any, folder: Path, place: int, port: int) -> None:
    with open(folder / f"{place}.log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    status = 1
    try:
        limit = timedelta(seconds=60)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=limit)
        result = function(store, place, json.loads((folder / "payload.json").read_text()))
        (folder / f"{place}.json").write_text(json.dumps(result))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # threads of a broken group must not hold up the end


if __name__ == "__main__":
    _main(*sys.argv[1:])
