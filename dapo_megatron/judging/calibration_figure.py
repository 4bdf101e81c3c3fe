"""The picture of a calibration: reliability, accuracy by subject, and what the rewards miss."""

import math
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dapo_megatron.files import atomic_path

MOST_SUBJECTS = 12  # those with the most cases
COLOURS = ("#2b5c8a", "#c65b3c", "#3f8f74", "#8463a5", "#b5892e", "#5f6b73")
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def draw_calibration(report: dict[str, Any], path: Path) -> None:
    """Write the picture of a report of `calibrate` as PNG, whole or not at all."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 4.2), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        reliable, subjects, rewards = figure.subplots(1, 3)
        _draw_reliability(reliable, report)
        _draw_subjects(subjects, report)
        _draw_rewards(rewards, report)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png")


def _draw_reliability(axes: Axes, report: dict[str, Any]) -> None:
    axes.plot([0, 1], [0, 1], color="#b8c0c6", linewidth=1, zorder=0)
    for colour, (name, judge) in zip(COLOURS * 9, report["judges"].items(), strict=False):
        bins = judge["reliability"]
        points = [(p, s, n) for p, s, n in zip(bins["mean_p"], bins["share"], bins["counts"], strict=True) if n]
        if points:
            p, share, counts = zip(*points, strict=True)
            axes.plot(p, share, color=colour, linewidth=1.4, label=f"{name}: {_told(judge['quality'])}")
            largest = max(counts)
            axes.scatter(p, share, s=[8 + 80 * n / largest for n in counts], color=colour, alpha=0.7)
    axes.set(title="Reliability (area: cases)", xlabel="P(YES)", ylabel="share of yes", xlim=(-0.03, 1.03))
    axes.set_ylim(-0.03, 1.03)
    axes.legend(loc="upper left", fontsize=7)


def _draw_subjects(axes: Axes, report: dict[str, Any]) -> None:
    subjects = sorted(report["subjects"], key=lambda subject: -report["subjects"][subject])[:MOST_SUBJECTS]
    judges = report["judges"]
    height = 0.8 / max(1, len(judges))
    for i, (name, judge) in enumerate(judges.items()):
        found = judge.get("by_subject", {next(iter(report["subjects"])): judge})
        shares = [found[subject]["quality"]["accuracy"] or 0.0 for subject in subjects]
        axes.barh([row + i * height for row in range(len(subjects))], shares, height, color=COLOURS[i % 6], label=name)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(subjects))], [_short(s, report) for s in subjects])
    axes.invert_yaxis()
    axes.set(title="Accuracy by subject", xlim=(0, 1))
    axes.legend(fontsize=7)


def _draw_rewards(axes: Axes, report: dict[str, Any]) -> None:
    bars = [("rule", report["rule"]["brier"], "#7a858e")]
    for i, (name, judge) in enumerate(report["judges"].items()):
        bars += [(f"{name}, {mode}", judge["rewards"][mode]["brier"], COLOURS[i % 6]) for mode in ("binary", "soft")]
    axes.barh([name for name, _, _ in bars], [value or 0.0 for _, value, _ in bars], color=[bar[2] for bar in bars])
    axes.invert_yaxis()
    axes.set(title="Reward: mean squared distance from the truth", xlim=(0, None))


def _told(quality: dict[str, Any]) -> str:
    values = [f"{name} {math.nan if value is None else value:.3f}" for name, value in quality.items() if name in _SHOWN]
    return ", ".join(values)


_SHOWN = ("accuracy", "auc", "ece")


def _short(subject: str, report: dict[str, Any]) -> str:
    name = subject if len(subject) <= 24 else subject[:23] + "…"
    return f"{name.replace('$', '')} ({report['subjects'][subject]})"
