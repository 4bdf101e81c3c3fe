"""The picture of the report: eighteen cells, a panel for each thing to watch while training with DAPO; three more for
a critic."""

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dapo_megatron.monitoring.histograms import draw_histograms
from dapo_megatron.monitoring.report_entropy import draw_entropy_law
from dapo_megatron.monitoring.run_record import RunRecord, Series

COLOURS = ("#2b5c8a", "#c65b3c", "#3f8f74", "#8463a5", "#b5892e", "#5f6b73", "#a8456b", "#4d9fb0")
STYLES = ("-", "--", ":", "-.", (0, (1, 3)))
TIME_PARTS = (("rollout", "#6c93b8"), ("learn", "#dc9a83"), ("reshard", "#c9a95c"), ("other", "#dde1e5"))
INK, GREY = "#22282d", "#7a858e"
MANY_POINTS, SMOOTH_SHARE = 120, 30  # longer curves get a running mean over 1/30 of their points
STYLE = {
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": "#b8c0c6",
    "axes.labelcolor": GREY,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebee",
    "grid.linewidth": 0.8,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.7,
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Panel:
    """Curves over rollout steps; each line is (metric key, name in the legend, drawn with markers)."""

    title: str
    unit: str
    lines: tuple[tuple[str, str, bool], ...]
    limits: tuple[float, float] | None = None
    scale: str = "linear"  # linear, log, symlog, or auto: log when the largest value dwarfs the median


ACCURACY = Panel(
    "Accuracy",
    "fraction right",
    (
        ("accuracy/train", "train", False),
        ("validation/accuracy", "validation, sampled", True),
        ("validation/accuracy_greedy", "validation, greedy", True),
        ("validation/majority", "majority", True),
        ("validation/pass", "any", True),
    ),
    limits=(-0.02, 1.02),
)
PANELS = (
    Panel("Reward", "mean per response", (("reward/mean", "reward", False),)),
    Panel("Entropy", "nats per token", (("entropy/mean", "entropy", False),)),
    Panel("Mean probability", "of sampled tokens", (("probability/mean", "probability", False),)),
    Panel(
        "Response length",
        "tokens",
        (("response_length/mean", "train", False), ("validation/response_length", "validation", True)),
    ),
    Panel(
        "Clip fractions",
        "fraction of tokens",
        (
            ("clip_fraction/low", "low", False),
            ("clip_fraction/high", "high", False),
            ("clip_fraction/dual", "dual", False),
        ),
    ),
    Panel(
        "Outcomes",
        "fraction of groups, of responses",
        (
            ("groups/all_right", "all right", False),
            ("groups/all_wrong", "all wrong", False),
            ("truncated_fraction", "truncated", False),
        ),
    ),
)
LATER_PANELS = (
    Panel("Gradient norm", "before clipping", (("grad_norm", "gradient norm", False),), scale="auto"),
    Panel(
        "Mismatch",
        "mean |Δ log-prob|, nats",
        (("mismatch/logprob_abs_mean", "to the engine", False), ("kl/mean", "KL to the reference", False)),
        scale="log",
    ),
)


ENTROPY_PANELS = (
    Panel(
        "Entropy change",
        "nats per token and step",
        (("entropy/measured_change", "measured", False), ("entropy/predicted_change", "foretold", False)),
    ),
    Panel(
        "Covariance",
        "of log-prob and advantage",
        (("covariance/mean", "mean", False), ("covariance/top", "top 0.2 %", False)),
        scale="symlog",
    ),
)


CRITIC_PANELS = (
    Panel(
        "Critic",
        "explained variance",
        (("critic/explained_variance", "explained variance", False),),
        scale="symlog",  # far below 0 while a critic knows nothing
    ),
    Panel(
        "Values",
        "mean over trained tokens",
        (("critic/value_mean", "values", False), ("critic/return_mean", "returns", False)),
    ),
    Panel("Critic loss", "mean of updates", (("critic/loss", "critic loss", False),), scale="auto"),
)


LENGTH_QUANTILES = Panel(
    "Length spread",
    "tokens",
    tuple((f"response_length/p{q}", f"{q} %", False) for q in (10, 50, 90, 99)),
)
HISTOGRAMS = (
    ("Lengths of a step", "tokens", "histogram/response_length"),
    ("Rewards of a step", "reward, shaping included", "histogram/reward"),
)


def draw_report(runs: Sequence[RunRecord]) -> bytes:
    """PNG of 1600 x 3000 pixels, 3500 high where a run has a critic. One run: a colour a metric; several: a colour a
    run and a line style a metric."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": matplotlib.rcParams["backend"], **STYLE}):
        has_critic = any(run.series("critic/loss")[0] for run in runs)
        rows = 7 if has_critic else 6
        figure = Figure(figsize=(16, 5 * rows), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.14, wspace=0.03, hspace=0.03)
        grid = figure.add_gridspec(rows, 3)
        has_supervised = any(run.supervised_loss()[0] for run in runs)
        _draw_panel(figure.add_subplot(grid[0, : 2 if has_supervised else 3]), ACCURACY, runs)
        if has_supervised:
            _draw_supervised(figure.add_subplot(grid[0, 2]), runs)
        for place, panel in enumerate(PANELS):
            _draw_panel(figure.add_subplot(grid[1 + place // 3, place % 3]), panel, runs)
        _draw_times(figure.add_subplot(grid[3, 0]), runs)
        for place, panel in enumerate(LATER_PANELS):
            _draw_panel(figure.add_subplot(grid[3, 1 + place]), panel, runs)
        for place, panel in enumerate(ENTROPY_PANELS):
            _draw_panel(figure.add_subplot(grid[4, place]), panel, runs)
        _draw_law(figure.add_subplot(grid[4, 2]), runs)
        _draw_panel(figure.add_subplot(grid[5, 0]), LENGTH_QUANTILES, runs)
        for place, (title, unit, key) in enumerate(HISTOGRAMS):
            _draw_histograms(figure.add_subplot(grid[5, 1 + place]), title, unit, key, runs)
        for place, panel in enumerate(CRITIC_PANELS if has_critic else ()):
            _draw_panel(figure.add_subplot(grid[6, place]), panel, runs)
        _draw_heading(figure, runs)
        figure.align_ylabels()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png")
        return buffer.getvalue()


def time_shares(run: RunRecord) -> tuple[list[float], dict[str, list[float]]]:
    """Steps with time/step, and for each of rollout, learn, reshard and other its share of that time (they sum to 1).

    A part that was not recorded counts as 0; time/validation is no part of time/step.
    """
    steps: list[float] = []
    shares: dict[str, list[float]] = {name: [] for name, _ in TIME_PARTS}
    seconds_by_part = {name: dict(zip(*run.series(f"time/{name}"), strict=True)) for name, _ in TIME_PARTS[:-1]}
    for step, step_seconds in zip(*run.series("time/step"), strict=True):
        if not step_seconds > 0:
            continue
        known = {name: seconds.get(step, 0.0) for name, seconds in seconds_by_part.items()}
        known = {name: seconds if math.isfinite(seconds) else 0.0 for name, seconds in known.items()}
        total = max(step_seconds, sum(known.values()))  # parts that overlap may add up to more than the step
        steps.append(step)
        for name, seconds in known.items():
            shares[name].append(seconds / total)
        shares["other"].append(1.0 - sum(known.values()) / total)
    return steps, shares


def _step_limits(runs: Sequence[RunRecord]) -> tuple[float, float]:
    steps = [float(row["step"]) for run in runs for row in run.metrics] or [0.0, 1.0]
    margin = max(0.5, 0.02 * (max(steps) - min(steps)))
    return min(steps) - margin, max(steps) + margin


def _draw_panel(axes: Any, panel: Panel, runs: Sequence[RunRecord]) -> None:
    axes.set_title(panel.title)
    axes.set_ylabel(panel.unit)
    drawn: list[Series] = []
    names: dict[int, str] = {}
    for run_place, run in enumerate(runs):
        for line_place, (key, name, marked) in enumerate(panel.lines):
            series = run.series(key)
            if not any(map(math.isfinite, series[1])):
                continue
            colour = COLOURS[(line_place if len(runs) == 1 else run_place) % len(COLOURS)]
            style = "-" if len(runs) == 1 else STYLES[line_place]
            _draw_curve(axes, series, colour, style, marked)
            drawn.append(series)
            names[line_place] = name
    if not drawn:
        _say_empty(axes)
        return
    if panel.limits:
        axes.set_ylim(*panel.limits)
    _scale(axes, panel.scale, [value for _, values in drawn for value in values if math.isfinite(value)])
    _whole_steps(axes, "rollout step")
    axes.set_xlim(*_step_limits(runs))
    if len(names) > 1:
        looks = {place: (COLOURS[place], "-") if len(runs) == 1 else (GREY, STYLES[place]) for place in sorted(names)}
        handles = [Line2D([], [], color=colour, ls=style) for colour, style in looks.values()]
        _legend_beside_title(axes, handles, [names[place] for place in looks])


def _draw_curve(axes: Any, series: Series, colour: str, style: str, marked: bool) -> None:
    steps, values = series
    if len(steps) <= MANY_POINTS:
        # a curve of one point is invisible without a marker
        axes.plot(steps, values, color=colour, ls=style, marker="o" if marked or len(steps) == 1 else None, ms=4.5)
        return
    axes.plot(steps, values, color=colour, ls="-", lw=0.8, alpha=0.25)
    axes.plot(steps, _running_mean(values, max(3, len(values) // SMOOTH_SHARE)), color=colour, ls=style)


def _draw_supervised(axes: Any, runs: Sequence[RunRecord]) -> None:
    axes.set_title("Supervised warm start")
    axes.set_ylabel("loss, nats per token")
    for place, run in enumerate(runs):
        series = run.supervised_loss()
        if series[0]:
            _draw_curve(axes, series, COLOURS[place % len(COLOURS)], "-", False)
    _whole_steps(axes, "supervised step")


def _draw_law(axes: Any, runs: Sequence[RunRecord]) -> None:
    axes.set_title("Entropy law")
    axes.set_ylabel("train accuracy")
    curves = draw_entropy_law(axes, runs, COLOURS)
    if not axes.lines:
        _say_empty(axes)
        return
    axes.set_xlabel("entropy, nats per token")
    axes.set_xlim(left=0.0)
    if curves:
        handles = [Line2D([], [], color=GREY, ls=style) for style, _ in curves]
        axes.legend(handles, [words for _, words in curves], loc="best", labelcolor=INK)


def _draw_histograms(axes: Any, title: str, unit: str, key: str, runs: Sequence[RunRecord]) -> None:
    axes.set_title(title)
    axes.set_ylabel("share of the responses")
    outlines = draw_histograms(axes, runs, key, COLOURS)
    if not axes.patches and not axes.lines:
        _say_empty(axes)
        return
    axes.set_xlabel(unit)
    if outlines:
        handles = [Line2D([], [], color=colour) for colour, _ in outlines]
        _legend_beside_title(axes, handles, [words for _, words in outlines])


def _draw_times(axes: Any, runs: Sequence[RunRecord]) -> None:
    axes.set_title("Time shares")
    timed = [(run, *time_shares(run)) for run in runs]
    timed = [(run, steps, shares) for run, steps, shares in timed if steps]
    if not timed:
        _say_empty(axes)
        return
    if len(runs) == 1:
        _, steps, shares = timed[0]
        left = [0.0] * len(steps)
        for name, colour in TIME_PARTS:
            right = [a + b for a, b in zip(left, shares[name], strict=True)]
            if len(steps) > 1:
                axes.fill_between(steps, left, right, color=colour, lw=0)
            else:
                axes.bar(steps, shares[name], bottom=left, color=colour, width=0.6)
            left = right
        axes.set_ylim(0, 1)
        axes.margins(x=0)
        axes.set_ylabel("share of a step")
        _whole_steps(axes, "rollout step")
    else:
        starts = [0.0] * len(timed)
        for name, colour in TIME_PARTS:
            widths = [sum(shares[name]) / len(steps) for _, steps, shares in timed]
            axes.barh(range(len(timed)), widths, left=starts, color=colour, height=0.6)
            starts = [a + b for a, b in zip(starts, widths, strict=True)]
        axes.set_yticks(range(len(timed)), [_label(run.label, 24) for run, _, _ in timed])
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_xlabel("mean share of a step")
        axes.grid(False, axis="y")
    handles = [Line2D([], [], color=colour, lw=6) for _, colour in TIME_PARTS]
    _legend_beside_title(axes, handles, [name for name, _ in TIME_PARTS], length=0.8)


def _draw_heading(figure: Any, runs: Sequence[RunRecord]) -> None:
    if len(runs) == 1:
        figure.suptitle(_label(runs[0].label, 80), x=0.012, ha="left", fontsize=18, fontweight="bold")
        return
    handles = [Line2D([], [], color=COLOURS[place % len(COLOURS)], lw=4) for place in range(len(runs))]
    labels = [_label(run.label, 40) for run in runs]
    figure.legend(handles, labels, loc="outside upper left", ncols=min(len(runs), 5), fontsize=13, handlelength=1.2)


def _legend_beside_title(axes: Any, handles: list[Line2D], names: list[str], length: float = 1.6) -> None:
    axes.legend(
        handles,
        names,
        loc="lower right",
        bbox_to_anchor=(1.0, 1.015),
        ncols=len(names),
        borderaxespad=0.0,
        borderpad=0.2,
        columnspacing=1.0,
        handlelength=length,
        handletextpad=0.5,
        labelcolor=INK,
    )


def _scale(axes: Any, scale: str, values: list[float]) -> None:
    if scale == "symlog":
        axes.set_yscale("symlog", linthresh=1e-3)
        return
    positive = sorted(value for value in values if value > 0)
    if not positive or scale == "linear":
        return
    if scale == "log" or positive[-1] > 20 * positive[len(positive) // 2]:
        axes.set_yscale("log")


def _whole_steps(axes: Any, name: str) -> None:
    axes.set_xlabel(name)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _say_empty(axes: Any) -> None:
    axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color=GREY)
    axes.set_xticks([])
    axes.set_yticks([])


def _label(text: str, limit: int) -> str:
    text = "".join(c if c.isprintable() else "?" for c in text)
    # $ starts a formula, and a leading _ hides a legend entry
    text = (text if len(text) <= limit else "…" + text[-limit + 1 :]).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _running_mean(values: list[float], width: int) -> list[float]:
    half = width // 2
    means = []
    for place in range(len(values)):
        # narrower towards the start, so that a curve begins at its own first value; the noisy end keeps its width
        near = [v for v in values[max(0, place - half) : place + min(half, place) + 1] if math.isfinite(v)]
        means.append(sum(near) / len(near) if near else math.nan)
    return means
