"""Two processes of a machine that take turns: each tells the other, by a byte in a pipe, that it has had its turn.

One makes both pipes and describes them; the other opens them through /proc, as it opens shared memory. The end of a
process closes its pipes, which the other notices at once.
"""

import os
import select
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from dapo_megatron.errors import RunError


class PeerGone(Exception):
    """The other process has ended, or has closed its side."""


class PeerLate(Exception):
    """The other process has not had its turn in time."""


@dataclass
class Turns:
    """One side: a pipe to hear from, a pipe to tell through; file numbers, -1 when closed."""

    inward: int
    outward: int

    def tell(self) -> None:
        """Say that it is the other's turn.

        Raises:
            PeerGone: nobody is there to hear it.
        """
        try:
            os.write(self.outward, b".")
        except OSError:
            raise PeerGone from None

    def hear(self, deadline: float) -> None:
        """Wait for one word of the other, until `deadline` (time.monotonic).

        Raises:
            PeerGone, PeerLate.
        """
        poll = select.poll()
        poll.register(self.inward, select.POLLIN)
        while not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            if time.monotonic() >= deadline:
                raise PeerLate
        if os.read(self.inward, 1) == b"":
            raise PeerGone

    def close(self) -> None:
        """Let the other know that nothing more comes; again and again, if need be."""
        for number in (self.inward, self.outward):
            _close(number)
        self.inward = self.outward = -1


def first_to_speak(turns: Mapping[int, Turns], deadline: float) -> int | None:
    """The key of one whose peer has said something, or is gone; None if there is none until `deadline`."""
    poll = select.poll()
    keys = {}
    for key, one in turns.items():
        poll.register(one.inward, select.POLLIN)
        keys[one.inward] = key
    while True:
        spoken = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        if spoken:
            return keys[spoken[0][0]]
        if time.monotonic() >= deadline:
            return None


@dataclass
class Offer:
    """Turns with a process that is not there yet. `turns`: this side; the other opens what `describe` says."""

    turns: Turns = field(init=False)

    def __post_init__(self) -> None:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        self.turns = Turns(ours_in, ours_out)
        self._theirs = [theirs_in, theirs_out]

    def describe(self) -> dict[str, Any]:
        """All that `open_turns` needs, as plain JSON values."""
        return {"pid": os.getpid(), "ends": [[number, os.fstat(number).st_ino] for number in self._theirs]}

    def taken(self) -> None:
        """The other has opened its side: from now on its end is noticed."""
        for number in self._theirs:
            _close(number)
        self._theirs = []

    def close(self) -> None:
        """Close both sides."""
        self.taken()
        self.turns.close()


def open_turns(description: Mapping[str, Any]) -> Turns:
    """The other side of an `Offer`, in another process of the same machine and user.

    Raises:
        RunError: the process that offered it has gone, or cannot be reached from here.
    """
    pid = int(description["pid"])
    opened: list[int] = []
    try:
        for (number, inode), mode in zip(description["ends"], (os.O_RDONLY, os.O_WRONLY), strict=True):
            opened.append(os.open(f"/proc/{pid}/fd/{int(number)}", mode | os.O_CLOEXEC))
            if os.fstat(opened[-1]).st_ino != inode:  # a number that is used again, for another file
                raise OSError("it is another process by now")
    except OSError as error:
        for number in opened:
            _close(number)
        raise RunError(
            f"resharding: the pipes of process {pid} cannot be opened ({error.strerror or error}): it has ended, runs "
            "on another machine or in another container, or as another user"
        ) from None
    return Turns(*opened)


def _close(number: int) -> None:
    if number >= 0:
        with suppress(OSError):
            os.close(number)
