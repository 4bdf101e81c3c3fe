"""What became of one part of `doctor --parity`."""

from dataclasses import dataclass
from typing import Any

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True)
class Measurement:
    """A number that must not exceed its bound; `text` says of what, and in which unit."""

    number: float
    bound: float
    text: str


class Skipped(Exception):
    """A part cannot run here, and why."""


@dataclass(frozen=True)
class Verdict:
    """outcome: PASSED, FAILED or SKIPPED. number and bound: None where nothing was measured."""

    part: str
    outcome: str
    text: str
    number: float | None = None
    bound: float | None = None
    seconds: float = 0.0


def verdict_of(part: str, told: dict[str, Any] | None, why: str, *, seconds: float, needed: str | None) -> Verdict:
    """The verdict on what the process of a part left (None: nothing, and `why`).

    A part that the recipe needs may not be skipped; a number that is NaN has failed.
    """
    if told is None:
        return Verdict(part, FAILED, why, seconds=seconds)
    if "skipped" in told:
        if needed is not None:
            return Verdict(part, FAILED, f"{needed} needs it, and it cannot run: {told['skipped']}", seconds=seconds)
        return Verdict(part, SKIPPED, told["skipped"], seconds=seconds)
    number, bound = float(told["number"]), float(told["bound"])
    outcome = PASSED if number <= bound else FAILED
    return Verdict(part, outcome, told["text"], number, bound, seconds)
