"""The report's panel of the entropy law: accuracy over entropy, and the curves that early steps foretold."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dapo_megatron.monitoring.entropy_law import SHARES, EntropyLaw, fit_entropy_law
from dapo_megatron.monitoring.run_record import RunRecord

REWARD = "accuracy/train"  # R of the law: in every step, and free of what shaping adds to the reward
CURVE_STYLES = ("--", "-")  # for SHARES


def law_points(run: RunRecord) -> tuple[list[float], list[float]]:
    """(entropies, accuracies) of the steps that recorded both, in step order."""
    rewards = dict(zip(*run.series(REWARD), strict=True))
    pairs = [(h, rewards[step]) for step, h in zip(*run.series("entropy/mean"), strict=True) if step in rewards]
    pairs = [pair for pair in pairs if all(map(math.isfinite, pair))]
    return [h for h, _ in pairs], [r for _, r in pairs]


def describe_law(run: RunRecord, share: float) -> str:
    """The law fitted on the first `share` of a run, as a table cell; empty where there is none."""
    law = fit_entropy_law(*law_points(run), share)
    return "" if law is None else f"R = {-law.a:+.3g}·exp(H) {law.b:+.3g}; {_outlook(law)}"


def draw_entropy_law(axes: Any, runs: Sequence[RunRecord], colours: Sequence[str]) -> list[tuple[str, str]]:
    """Draw points (filled: the first 40 %, hollow: the rest) and curves; returns (style, words) of the curves drawn.

    The words are those of the only run, or only name the share where there are several.
    """
    drawn: dict[str, str] = {}
    for place, run in enumerate(runs):
        entropies, rewards = law_points(run)
        if not entropies:
            continue
        colour = colours[place % len(colours)]
        known = math.ceil(SHARES[-1] * len(entropies) - 1e-9)
        axes.plot(entropies[:known], rewards[:known], "o", color=colour, ms=3.5)
        axes.plot(entropies[known:], rewards[known:], "o", color=colour, ms=3.5, mfc="none", mew=0.8)
        for share, style in zip(SHARES, CURVE_STYLES, strict=True):
            law = fit_entropy_law(entropies, rewards, share)
            if law is None:
                continue
            x = np.linspace(0.0, max(entropies), 60)
            axes.plot(x, law.reward(x), color=colour, ls=style, lw=1.3)
            drawn[style] = f"{share:.0%}: {_outlook(law)}" if len(runs) == 1 else f"fit on {share:.0%}"
    seen = [reward for run in runs for reward in law_points(run)[1]]
    if seen:
        room = max(0.1, max(seen) - min(seen))  # a bad fit must not flatten the points
        axes.set_ylim(max(-0.05, min(seen) - room), min(1.05, max(seen) + room))
    return list(drawn.items())


def _outlook(law: EntropyLaw) -> str:
    error = "" if math.isnan(law.rest_error) else f", error on the rest {law.rest_error:.3f}"
    return f"ceiling {law.ceiling:.3f}{error}"
