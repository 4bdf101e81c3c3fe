"""The picture of an entropy report: how entropies are spread, forking and steady tokens, what training changed."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dapo_megatron.files import atomic_path
from dapo_megatron.monitoring.step_text import printable

LISTED = 12  # forking tokens
LONGEST_LABEL = 16  # characters of a token
OURS, BASE = "#2b5c8a", "#c65b3c"
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def draw_entropy(report: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a report of `analyze entropy` as PNG, whole or not at all."""
    base = report.get("base")
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a token may be of any script
        panels = 2 if base is None else 3
        figure = Figure(figsize=(4.4 * panels, 4.2), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, panels)
        _draw_percentiles(axes[0], report)
        _draw_tokens(axes[1], report)
        if base is not None:
            _draw_change(axes[2], base)
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png")


def _draw_percentiles(axes: Axes, report: Mapping[str, Any]) -> None:
    drawn = [("model", report, OURS)] + ([("base", report["base"], BASE)] if "base" in report else [])
    for name, of, colour in drawn:
        points = [(float(value), int(p)) for p, value in of["percentiles"].items()]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3, linewidth=1.4, label=name)
    top = report["top"]
    axes.axvline(top["least_entropy"], color="#b8c0c6", linewidth=1, zorder=0, label=f"top {top['ratio']:.0%} begins")
    axes.set(title=f"Entropy of {report['tokens']} tokens", xlabel="nats", ylabel="percentile", ylim=(0, 101))
    axes.legend(loc="lower right")


def _draw_tokens(axes: Axes, report: Mapping[str, Any]) -> None:
    tokens = report["forking"][:LISTED]
    axes.barh(range(len(tokens)), [token["mean"] for token in tokens], color=OURS)
    # parse_math: a token such as $x$ is text, not a formula
    axes.set_yticks(range(len(tokens)), [_label(token) for token in tokens], parse_math=False)
    axes.invert_yaxis()
    axes.set(title="Forking tokens (count)", xlabel="mean entropy, nats")


def _draw_change(axes: Axes, base: Mapping[str, Any]) -> None:
    rows = base["change"]
    middles = [(row["from"] + row["to"]) / 2 for row in rows]
    widths = [0.9 * (row["to"] - row["from"]) for row in rows]
    axes.bar(middles, [row["mean_change"] for row in rows], widths, color=OURS)
    axes.axhline(0, color="#5f6b73", linewidth=0.8)
    overlap = base["overlap"]
    axes.set(title=f"Top {overlap['ratio']:.0%} shared: {overlap['share']:.1%}", xlabel="percentile of base entropy")
    axes.set_ylabel("mean change, nats")


def _label(token: Mapping[str, Any]) -> str:
    text = printable(token["text"]).replace("\n", "\\n").replace("\t", "\\t")
    text = text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…"
    return f"'{text}' ({token['count']})"
