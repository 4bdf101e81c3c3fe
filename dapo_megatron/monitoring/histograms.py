"""Histograms of a step, small enough for a line of metrics.jsonl, and their drawing in the report."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dapo_megatron.monitoring.run_record import RunRecord

BINS = 20


def histogram(values: ArrayLike) -> dict[str, Any]:
    """{low, high, counts}: how many of at least one finite value fall into each of 20 equal bins from the least, `low`,
    to the largest, `high`."""
    data = np.asarray(values, dtype=np.float64)
    low, high = float(data.min()), float(data.max())
    counts, _ = np.histogram(data, BINS, (low, high if high > low else low + 1.0))
    return {"low": low, "high": high, "counts": counts.tolist()}


def draw_histograms(axes: Any, runs: Sequence[RunRecord], key: str, colours: Sequence[str]) -> list[tuple[str, str]]:
    """Outlines of shares: of one run its first, middle and last step, of several the last step of each.

    Returns (colour, words) of the outlines of one run.
    """
    drawn: list[tuple[str, str]] = []
    for place, run in enumerate(runs):
        steps = [(row["step"], row[key]) for row in run.metrics if _is_histogram(row.get(key))]
        shown = steps[-1:]
        if len(runs) == 1 and steps:
            shown = [steps[i] for i in sorted({0, len(steps) // 2, len(steps) - 1})]
        for i, (step, found) in enumerate(shown):
            colour = colours[(place if len(runs) > 1 else i) % len(colours)]
            _outline(axes, found, colour)
            drawn.append((colour, f"step {step:.0f}"))
    return drawn if len(runs) == 1 else []


def _outline(axes: Any, found: Mapping[str, Any], colour: str) -> None:
    low, high = found["low"], found["high"]
    if high == low:
        axes.axvline(low, color=colour)  # all values are equal
        return
    counts = np.asarray(found["counts"], dtype=np.float64)
    axes.stairs(counts / max(1.0, counts.sum()), np.linspace(low, high, len(counts) + 1), color=colour, lw=1.7)


def _is_histogram(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and all(isinstance(value.get(name), int | float) for name in ("low", "high"))
        and isinstance(value.get("counts"), list)
        and all(isinstance(count, int) for count in value["counts"])
        and len(value["counts"]) > 0
    )
