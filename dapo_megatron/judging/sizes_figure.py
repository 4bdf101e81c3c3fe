"""The picture of students by the number of cases that they learned from."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dapo_megatron.files import atomic_path
from dapo_megatron.judging.calibration_figure import COLOURS, STYLE
from dapo_megatron.judging.sizes import Student

RULE = "#7a858e"


def draw_sizes(report: Mapping[str, Any], cells: Sequence[Student], path: Path) -> None:
    """Write accuracy, AUC, ECE and the rewards' distance from the truth by size as PNG, whole or not at all."""
    judges = report["judges"]
    panels: list[tuple[str, dict[str, Callable[[Mapping[str, Any]], float | None]], str]] = [
        ("Accuracy", {"": lambda judge: judge["quality"]["accuracy"]}, "accuracy"),
        ("AUC", {"": lambda judge: judge["quality"]["auc"]}, "auc"),
        ("ECE", {"": lambda judge: judge["quality"]["ece"]}, "ece"),
        (
            "Squared error of the reward",
            {mode: lambda judge, mode=mode: judge["rewards"][mode]["brier"] for mode in ("binary", "soft")},
            "brier",
        ),
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13, 4.4), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        for axes, (title, values, rule) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            for name, value in values.items():
                _draw_students(axes, judges, cells, name, value)
            axes.axhline(report["rule"][rule] or 0.0, color=RULE, linestyle=":", label="rule")
            if "teacher" in judges and "" in values:
                axes.axhline(values[""](judges["teacher"]) or 0.0, color="black", linewidth=0.8, label="teacher")
            axes.set(title=title, xlabel="cases learned from")
            axes.set_xscale("log", base=2)
            axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2))
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format="png")


def _draw_students(
    axes: Axes,
    judges: Mapping[str, Any],
    cells: Sequence[Student],
    name: str,
    value: Callable[[Mapping[str, Any]], float | None],
) -> None:
    for colour, targets in zip(COLOURS, dict.fromkeys(cell.targets for cell in cells), strict=False):
        points = [(cell.size, value(judges[cell.name])) for cell in cells if cell.targets == targets]
        known = [(size, found) for size, found in points if found is not None]
        label = f"{targets} targets" + (f", {name} reward" if name else "")
        style = "--" if name == "soft" else "-"
        axes.plot([x for x, _ in known], [y for _, y in known], style, marker="o", color=colour, label=label)
