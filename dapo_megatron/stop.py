"""A request to stop, from a signal to any rank, agreed on by all of them."""

import signal

import torch

from dapo_megatron.learner.reductions import largest_of_ranks
from dapo_megatron.stop_signals import CAUGHT, NOTICE, hold_notice, notice_came


class StopSignal:
    """Remembers SIGTERM, SIGINT and SIGUSR1; the loop asks between steps, so that a usable checkpoint is left, and
    waits for engines ask what has come to their rank."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._received = 0
        self._agreed = 0
        hold_notice()
        for number in (*CAUGHT, NOTICE):  # a thread older than `hold_notice` may take the notice
            signal.signal(number, self._remember)

    def requested(self) -> bool:
        """True on all ranks once one has received a signal; collective."""
        if not self._received and notice_came():
            self._received = NOTICE
        self._agreed = self._agreed or largest_of_ranks(int(self._received), self._device)
        return bool(self._agreed)

    def came(self) -> bool:
        """Whether a signal has come to this rank; not collective."""
        return bool(self._received) or notice_came()

    def presses(self) -> bool:
        """Whether one has that leaves no time for the step under way, as the notice of a time limit does; not
        collective."""
        return self._received in CAUGHT

    @property
    def exit_code(self) -> int:
        """128 + signal number after a stop, the same on all ranks; else 0."""
        return 128 + self._agreed if self._agreed else 0

    def _remember(self, number: int, _frame: object) -> None:
        self._received = number
