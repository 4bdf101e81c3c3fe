"""This process's place in a world of ranks, and the start of such a world on one machine.

In a world if RANK is set (torchrun); else if this is an srun step of several tasks; else `start_ranks` makes one.
"""

import ctypes
import errno
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

PORTS = (15000, 30000)  # below the ephemeral ones, which connections of others take at any time
STOP_GRACE_S = 300.0  # after the first signal ranks finish what they are doing; saves have their own time beside it
FAIL_GRACE_S = 60.0  # after one rank failed the others get this long to end what they started; likewise


@dataclass(frozen=True)
class World:
    """rank of size processes; local_rank of those on this machine."""

    rank: int
    size: int
    local_rank: int


def world_from_environment(environment: Mapping[str, str] = os.environ) -> World | None:
    """torchrun's variables, else srun's of a step with several tasks, else None: the caller starts ranks of its own."""
    if "RANK" in environment:
        return World(
            int(environment["RANK"]), int(environment.get("WORLD_SIZE", "1")), int(environment.get("LOCAL_RANK", "0"))
        )
    # the step's tasks, not the job's: salloc's interactive step is one task of a job with many
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "SLURM_STEP_ID" in environment and tasks > 1:
        return World(int(environment["SLURM_PROCID"]), tasks, int(environment["SLURM_LOCALID"]))
    return None


def start_ranks(
    command: Sequence[str],
    size: int,
    *,
    threads: int = 1,
    save_limit_s: float = 0.0,
    saving: Callable[[], bool] = lambda: False,
) -> int:
    """Run `command` as `size` ranks of one world on this machine and wait for all; returns the exit code.

    A signal to stop (SIGINT, SIGTERM) is passed on as SIGTERM and the ranks get STOP_GRACE_S, and `save_limit_s` twice:
    for the checkpoint under way and for that of the last step; a second one kills them. When a rank fails the others
    get FAIL_GRACE_S and, while rank 0 lives and `saving()` finds a checkpoint under way, up to `save_limit_s` more.
    Ranks die with this process, whatever ends it.
    """
    port = free_port()
    ranks = [_start(command, rank, size, port, threads) for rank in range(size)]
    received: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        received.append(number)
        for process in ranks:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL if len(received) > 1 else signal.SIGTERM)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _wait(ranks, received, save_limit_s, saving)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
                process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(ranks: list[subprocess.Popen], received: list[int], save_limit_s: float, saving: Callable[[], bool]) -> int:
    deadline = None
    latest = 0.0  # for a checkpoint under way at the deadline
    failed = 0
    while None in (ended := [process.poll() for process in ranks]):
        codes = [code for code in ended if code]
        if codes and not failed:
            failed = codes[0]
        if deadline is None and (failed or received):
            deadline = time.monotonic() + (STOP_GRACE_S + 2 * save_limit_s if received else FAIL_GRACE_S)
            latest = deadline if received else deadline + save_limit_s
        if deadline is not None and time.monotonic() > deadline:
            if time.monotonic() < latest and ranks[0].poll() is None and saving():
                time.sleep(0.1)
                continue
            print("ranks did not end in time; killing them", file=sys.stderr)
            for process in ranks:
                process.kill()
            deadline = time.monotonic() + FAIL_GRACE_S
        time.sleep(0.02)
    codes = [process.returncode for process in ranks]
    failed = failed or next((code for code in codes if code), 0)
    # the first rank to fail by itself tells more than one that was killed after it
    told = next((code for code in codes if code > 0), None)
    if told is not None:
        return told
    return 128 - failed if failed < 0 else failed


def _start(command: Sequence[str], rank: int, size: int, port: int, threads: int) -> subprocess.Popen:
    environment = dict(os.environ)
    environment.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS=str(threads),
    )
    # a session of its own: the terminal's Ctrl-C reaches the parent alone, which passes it on once
    return subprocess.Popen(list(command), env=environment, start_new_session=True, preexec_fn=die_with_parent)


def die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on, from the range that the system does not hand out by itself."""
    while True:
        port = random.randrange(*PORTS)
        with socket.socket() as listener:
            try:
                listener.bind((host, port))
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            return port
