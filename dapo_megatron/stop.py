"""A request to stop, from a signal to any rank, agreed on by all of them."""

import signal

import torch

from dapo_megatron.learner.reductions import any_rank


class StopSignal:
    """Remembers SIGTERM and SIGINT; the loop asks between steps, so that a usable checkpoint is left."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._received = 0
        self._agreed = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def requested(self) -> bool:
        """True on all ranks once one has received a signal; collective."""
        self._agreed = self._agreed or any_rank(bool(self._received), self._device)
        return self._agreed

    @property
    def exit_code(self) -> int:
        """128 + signal number after a stop, else 0."""
        return 128 + (self._received or signal.SIGTERM) if self._agreed else 0

    def _remember(self, number: int, _frame: object) -> None:
        self._received = number
