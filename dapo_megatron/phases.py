"""What this rank is doing, and for how long it does so by itself.

    own seconds of a phase = its seconds − seconds in which this process waited for other ranks within it

In step with each other, ranks spend the same time on every phase, whoever is slow: the others wait. So the waits are
counted too, where `torch.distributed` waits, and taken off; no rank is asked for anything. With NCCL it is the GPU that
waits, which cannot be seen from here, so phases with collectives take as long as on the slowest rank. The probe, a
product of matrices that is the same on every rank, then tells GPUs apart.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from torch.distributed import Work

OWN = ("rollout", "forward_backward", "optimizer", "reshard", "checkpoint", "probe")
WAITING = "waiting"
Mark = Callable[[str], AbstractContextManager]


class Phases:
    """`own(name)` around work of this rank, `mark(name)` around a phase of the whole loop. Both show in traces while
    `marks` has what writes them; of `own` the seconds are kept until `take`."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.marks: list[Mark] = []
        self._clock = clock
        self._waited = 0.0  # seconds, since ever
        self._begin()

    @contextmanager
    def mark(self, name: str) -> Iterator[None]:
        """A phase of the loop, in traces alone."""
        with self._marked(name):
            yield

    @contextmanager
    def own(self, name: str) -> Iterator[None]:
        """A phase whose seconds are this rank's own; one of `OWN`, and none within another."""
        with self._marked(name):
            started, waited = self._clock(), self._waited
            try:
                yield
            finally:
                self._seconds[name] += self._clock() - started - (self._waited - waited)

    def take(self) -> dict[str, float]:
        """Own seconds of each phase, and those spent waiting for other ranks anywhere, since the last call."""
        taken = self._seconds | {WAITING: self._waited - self._waited_before}
        self._begin()
        return taken

    @contextmanager
    def counting_waits(self) -> Iterator[None]:
        """Inside, waits of this thread for other ranks are counted; those of a thread that saves are its own affair."""
        original, thread = Work.wait, threading.get_ident()

        def wait(work: Work, *arguments: object, **named: object) -> object:
            if threading.get_ident() != thread:
                return original(work, *arguments, **named)
            started = self._clock()
            try:
                return original(work, *arguments, **named)
            finally:
                self._waited += self._clock() - started

        Work.wait = wait
        try:
            yield
        finally:
            Work.wait = original

    def _marked(self, name: str) -> ExitStack:
        stack = ExitStack()
        for mark in self.marks:
            stack.enter_context(mark(name))
        return stack

    def _begin(self) -> None:
        self._seconds = dict.fromkeys(OWN, 0.0)
        self._waited_before = self._waited
