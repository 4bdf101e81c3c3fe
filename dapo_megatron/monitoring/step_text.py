"""The words and numbers of a step, shared by the plain and the live console."""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

ETA_WINDOW = 20  # steps whose pace the estimate follows
BLOCKS = "▁▂▃▄▅▆▇█"


def quality(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, value) of what the policy does: accuracies, reward, entropy, length. Missing keys are left out."""
    return _present(
        metrics,
        ("train", "accuracy/train", ".3f"),
        ("reward", "reward/mean", "+.3f"),
        ("entropy", "entropy/mean", ".3f"),
        ("length", "response_length/mean", ".1f"),
        *VALIDATION,
    )


def validation(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, value) of the validation accuracies; empty when the step has none."""
    return _present(metrics, *VALIDATION)


def pace(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(label, value) of where the time goes, in seconds, and tokens/s of the whole step."""
    parts = _present(
        metrics,
        ("rollout", "time/rollout", ".2fs"),
        ("learn", "time/learn", ".2fs"),
        ("reshard", "time/reshard", ".2fs"),
    )
    rate = tokens_per_second(metrics)
    parts += _slowest(metrics)
    return [*parts, ("tokens/s", f"{rate:,.0f}")] if rate is not None else parts


def _slowest(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Of the rank that was slowest by itself, in steps that compare them."""
    rank, ratio = number(metrics, "time/ranks/work/slowest"), number(metrics, "time/ranks/work/ratio")
    return [] if rank is None or ratio is None else [("slowest", f"rank {rank:.0f} ×{ratio:.2f}")]


def tokens_per_second(metrics: Mapping[str, Any]) -> float | None:
    """Generated tokens (trained ones when nothing was generated) divided by time/step."""
    seconds = number(metrics, "time/step")
    tokens = number(metrics, "tokens/generated") or number(metrics, "tokens/trained")
    if seconds is None or tokens is None or not seconds > 0:
        return None
    rate = tokens / seconds
    return rate if math.isfinite(rate) else None


def number(metrics: Mapping[str, Any], key: str) -> float | None:
    """The value of `key` as a float, NaN included; None when it is missing or null."""
    value = metrics.get(key)
    return None if value is None else float(value)


def duration(seconds: float) -> str:
    """Seconds as 8s, 3m07s, 2h05m or 4d03h."""
    whole = max(0, round(seconds))
    for unit, name, part, part_name in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= unit:
            return f"{whole // unit}{name}{whole % unit // part:02d}{part_name}"
    return f"{whole}s"


def sparkline(values: list[float]) -> str:
    """One block a value, on the fixed scale 0..1; a space for NaN."""
    top = len(BLOCKS) - 1
    return "".join(" " if math.isnan(value) else BLOCKS[round(min(max(value, 0.0), 1.0) * top)] for value in values)


def printable(text: str) -> str:
    """`text` with control characters spelled out: model output must not steer the terminal."""
    return "".join(c if c in "\n\t" or c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class Pace:
    """Seconds a step, from the clock between the latest calls; so it counts validation and checkpoints as well."""

    def __init__(self, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total = total
        self._clock = clock
        self._seen: deque[tuple[int, float]] = deque(maxlen=ETA_WINDOW + 1)

    def eta(self, step: int, step_seconds: float | None) -> float | None:
        """Seconds left after `step` ended now; the first call goes by `step_seconds`. None: none left or unknown."""
        if self._seen and step <= self._seen[-1][0]:
            self._seen.clear()
        self._seen.append((step, self._clock()))
        left = self._total - step
        if left <= 0:
            return None
        (first, began), (last, ended) = self._seen[0], self._seen[-1]
        if last > first:
            return left * (ended - began) / (last - first)
        seconds = math.nan if step_seconds is None else left * step_seconds
        return seconds if math.isfinite(seconds) else None


VALIDATION = (("validation", "validation/accuracy", ".3f"), ("greedy", "validation/accuracy_greedy", ".3f"))


def _present(metrics: Mapping[str, Any], *wanted: tuple[str, str, str]) -> list[tuple[str, str]]:
    parts = []
    for label, key, form in wanted:
        value = number(metrics, key)
        if value is not None:
            unit = "s" if form.endswith("s") else ""
            parts.append((label, format(value, form.removesuffix("s")) + unit))
    return parts
