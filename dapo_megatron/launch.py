"""This process's place in a world of ranks, and the start of such a world on one machine.

In a world if RANK is set (torchrun); else if this is an srun step of several tasks; else `start_ranks` makes one.
Ranks meet at MASTER_ADDR and MASTER_PORT, which torchrun sets and `name_meeting_point` reads out of srun's step.
"""

import ctypes
import errno
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from dapo_megatron.stop_signals import CAUGHT, NOTICE

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


def name_meeting_point(environment: MutableMapping[str, str] = os.environ) -> None:
    """In an srun step: MASTER_ADDR = its first node, MASTER_PORT by job and step, where they are not set."""
    if "RANK" in environment or "SLURM_STEP_NODELIST" not in environment:
        return
    environment.setdefault("MASTER_ADDR", first_node(environment["SLURM_STEP_NODELIST"]))
    # jobs that share a node, and the steps of a job, must not meet at one port
    key = 97 * int(environment["SLURM_JOB_ID"]) + int(environment["SLURM_STEP_ID"])
    environment.setdefault("MASTER_PORT", str(PORTS[0] + key % (PORTS[1] - PORTS[0])))


def first_node(nodes: str) -> str:
    """The first name of a slurm host list: node[007-012,20],login1 → node007. srun puts rank 0 there."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", nodes)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first[0]) if first else ""


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
    for the checkpoint under way and for that of the last step; a second one kills them. SIGUSR1 is passed on as it is,
    gives them the same time and kills nobody. When a rank fails the others get FAIL_GRACE_S and, while rank 0 lives and
    `saving()` finds a checkpoint under way, up to `save_limit_s` more. Ranks die with this process, whatever ends it.
    """
    port = free_port()
    ranks = [_start(command, rank, size, port, threads) for rank in range(size)]
    received: list[int] = []

    def pass_on(number: int, _frame: object) -> None:
        if number == NOTICE:
            sent = NOTICE
        else:
            sent = signal.SIGKILL if any(earlier != NOTICE for earlier in received) else signal.SIGTERM
        received.append(number)
        for process in ranks:
            if process.poll() is None:
                process.send_signal(sent)
        if len(received) == 1:
            second = b"" if number == NOTICE else b"; a second signal kills them"
            with suppress(OSError):  # whoever read this may be gone; os.write: print could meet itself in a handler
                os.write(2, b"stopping: ranks that have begun leave a checkpoint" + second + b"\n")

    previous = {number: signal.signal(number, pass_on) for number in (*CAUGHT, NOTICE)}
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
            if failed < 0 and not received:
                reason = ", as for want of memory" if -failed == signal.SIGKILL else ""
                told = f"rank {ended.index(failed)} was killed by {signal.Signals(-failed).name}{reason}"
                print(f"{told}; the others end", file=sys.stderr, flush=True)
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
