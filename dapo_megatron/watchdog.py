"""A rank that makes no progress says where it stands, and ends; no run waits for ever, or dies without a word.

    rank 2: no progress for 600 s in learn at step 41 (run.stall_limit_s); it is at reward.py:12 score
    rank 0: …; it waits for other ranks in all_reduce, called at learner.py:201 step

All ranks move in step, so where one stands still the others soon wait for it, and each tells its own part.
"""

import faulthandler
import os
import sys
import threading
import time
import traceback
from types import FrameType
from typing import TextIO

LATE_S = 10.0  # what Python cannot tell any more, being stuck outside of it, is told this much later without Python
WAITING = (
    "torch/distributed/distributed_c10d.py",
    "torch/distributed/_functional",
    "pipeline_parallel/p2p_comm",
    "dapo_megatron/phases.py",
)


class Watchdog:
    """Ends this process with exit code 1 when `beat` was not called for `limit_s`; a thread of its own.

    Both what it waits for and the stacks of all threads go to `output`, standard error if None.
    """

    def __init__(self, limit_s: float, rank: int, output: TextIO | None = None) -> None:
        self._limit_s, self._rank = limit_s, rank
        self._output = sys.stderr if output is None else output
        self._main = threading.get_ident()
        self._closed = threading.Event()
        self.beat("the start")
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self, doing: str) -> None:
        """Progress: from now on this rank is `doing` something else."""
        self._doing, self._latest = doing, time.monotonic()
        faulthandler.dump_traceback_later(self._limit_s + LATE_S, exit=True, file=self._output)

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()
        faulthandler.cancel_dump_traceback_later()
        self._thread.join()

    def _watch(self) -> None:
        while not self._closed.wait(max(0.05, self._latest + self._limit_s - time.monotonic())):
            if time.monotonic() - self._latest > self._limit_s:
                self._tell()
                os._exit(1)

    def _tell(self) -> None:
        frames = sys._current_frames()
        stacks = [f"rank {self._rank}: no progress for {self._limit_s:g} s in {self._doing} (run.stall_limit_s); "]
        stacks[0] += where(frames[self._main])
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        for identity, frame in sorted(frames.items(), key=lambda item: item[0] != self._main):
            if identity != threading.get_ident():
                stack = "".join(traceback.format_stack(frame)).rstrip()
                stacks.append(f"rank {self._rank}, thread {names.get(identity, identity)}:\n{stack}")
        print("\n".join(stacks), file=self._output, flush=True)


def where(frame: FrameType) -> str:
    """What a thread is at: the collective that it waits in, and who called it; else its innermost line."""
    summary = traceback.extract_stack(frame)
    inside = [i for i, line in enumerate(summary) if any(part in line.filename for part in WAITING)]
    public = [i for i in inside if not summary[i].name.startswith(("_", "wrapper"))]
    if not public:
        return f"it is at {_place(summary[-1])}"
    caller = next((line for line in reversed(summary[: public[0]]) if "/torch/" not in line.filename), summary[0])
    return f"it waits for other ranks in {summary[public[0]].name}, called at {_place(caller)}"


def _place(line: traceback.FrameSummary) -> str:
    return f"{os.path.basename(line.filename)}:{line.lineno} {line.name}"
