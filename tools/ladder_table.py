"""Cells of the ladder → table (Markdown), rows (CSV) and curves (PNG)."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dapo_megatron.config import load_recipe
from dapo_megatron.errors import RequestError
from dapo_megatron.files import atomic_path
from dapo_megatron.monitoring.metrics import finite_number, read_metrics
from dapo_megatron.monitoring.report_figure import COLOURS, STYLE, STYLES

LAST_STEPS = 10  # the table's entropy, length, truncation and effective batch are means over these
SMOOTH_STEPS = 5  # running mean of the curves that are noisy from step to step


@dataclass(frozen=True)
class Rung:
    """A step of the ladder. `recipe`: file name under recipes/ladder/ without its ending."""

    recipe: str
    name: str


@dataclass(frozen=True)
class Cell:
    """One rung at one seed. `validations`: lines of metrics.jsonl with a validation; `steps`: those of rollout steps.

    prompts: prompts a step, of `samples` responses each. replaced: whether uniform groups are replaced, so that all
    trained ones are mixed.
    """

    rung: Rung
    seed: int
    prompts: int
    samples: int
    replaced: bool
    validations: list[dict[str, Any]]
    steps: list[dict[str, Any]]

    def values(self, key: str) -> list[float | None]:
        """`key` of every rollout step; None where a step lacks it. `effective_batch` is derived."""
        if key == "effective_batch":
            return [effective_batch(line, self.prompts, self.samples, replaced=self.replaced) for line in self.steps]
        return [finite_number(line, key) for line in self.steps]

    def late(self, key: str) -> float:
        """Mean of `key` over the last steps."""
        return _mean(self.values(key)[-LAST_STEPS:])

    def total(self, key: str) -> float:
        """Sum of `key` over all steps."""
        return sum(value or 0.0 for value in self.values(key))

    def last(self, key: str) -> float:
        """`key` of the last validation, NaN where there is none."""
        return float(self.validations[-1].get(key, math.nan)) if self.validations else math.nan

    def seconds(self) -> float:
        """Time of all steps and validations."""
        return self.total("time/step") + sum(line.get("time/validation", 0.0) for line in self.validations)

    def summary(self) -> str:
        """A line for the console."""
        return (
            f"accuracy {self.last(SAMPLED):.3f} sampled, {self.last(GREEDY):.3f} greedy; "
            f"{len(self.steps)} steps in {self.seconds():.0f} s"
        )


SAMPLED, GREEDY = "validation/accuracy", "validation/accuracy_greedy"
COLUMNS: tuple[tuple[str, str, Callable[[Cell], float]], ...] = (  # heading, format, value of a cell
    ("accuracy, sampled", ".3f", lambda cell: cell.last(SAMPLED)),
    ("accuracy, greedy", ".3f", lambda cell: cell.last(GREEDY)),
    ("entropy (nats)", ".3f", lambda cell: cell.late("entropy/mean")),
    ("response length (tokens)", ".1f", lambda cell: cell.late("response_length/mean")),
    ("truncated", ".3f", lambda cell: cell.late("truncated_fraction")),
    ("effective batch", ".2f", lambda cell: cell.late("effective_batch")),
    ("tokens generated (k)", ".0f", lambda cell: cell.total("tokens/generated") / 1000),
    ("tokens trained (k)", ".0f", lambda cell: cell.total("tokens/trained") / 1000),
    ("minutes", ".1f", lambda cell: cell.seconds() / 60),
)
COMPARED = 6  # of the columns, in the comparison of the last rung with the first
ROW_MEANS = {
    "entropy": "entropy/mean",
    "response_length": "response_length/mean",
    "truncated": "truncated_fraction",
    "effective_batch": "effective_batch",
    "clip_low": "clip_fraction/low",
    "clip_high": "clip_fraction/high",
}
ROW_SUMS = {"tokens_generated": "tokens/generated", "tokens_trained": "tokens/trained"}
PANELS = (  # title, unit, key
    ("Accuracy, sampled", "fraction right, held out", SAMPLED),
    ("Accuracy, greedy", "fraction right, held out", GREEDY),
    ("Entropy", "nats per token", "entropy/mean"),
    ("Effective batch", "mixed groups / prompts", "effective_batch"),
    ("Response length", "tokens", "response_length/mean"),
    ("Truncated", "fraction of responses", "truncated_fraction"),
    ("Clipped above", "fraction of tokens", "clip_fraction/high"),
    ("Trained tokens", "thousands, so far", "tokens/trained"),
)


def effective_batch(line: dict[str, Any], prompts: int, samples: int, *, replaced: bool) -> float | None:
    """Mixed groups trained on in a step, as a share of the prompts wanted; None where a prompt has one response.

    With replacement every trained group is mixed; without, those that are neither all right nor all wrong.
    """
    trained = finite_number(line, "groups/trained")
    if trained is None or samples == 1:
        return None
    if replaced:
        return trained / prompts
    if "groups/all_right" not in line:  # pairs of a file: nothing was drawn
        return None
    return trained * (1.0 - line["groups/all_right"] - line["groups/all_wrong"]) / prompts


def check_finished(marker: Path, wanted: str) -> bool:
    """Whether `marker` says that the cell was finished by the recipe `wanted`.

    Raises:
        RequestError: it was finished by another one.
    """
    if not marker.exists():
        return False
    if marker.read_text(encoding="utf-8") != wanted:
        raise RequestError(
            f"{marker.with_suffix('')} ({marker.name}) is of other settings; remove both or use another --out"
        )
    return True


def read_cell(directory: Path, seed: int, rung: Rung) -> Cell:
    """The cell of a finished run directory."""
    recipe = load_recipe(directory / "config.yaml")
    lines = [line for line in read_metrics(directory / "metrics.jsonl") if "step" in line]
    return Cell(
        rung,
        seed,
        recipe.rollout.prompts_per_step,
        recipe.rollout.samples_per_prompt,
        recipe.algorithm.dynamic_sampling.enabled,
        [line for line in lines if SAMPLED in line],
        [line for line in lines if "groups/trained" in line],
    )


def table_markdown(cells: Sequence[Cell], *, of: str = "rung", last_less_first: bool = True) -> str:
    """A row a rung: mean ± standard deviation over its seeds (one seed: the value). Below it the last rung less the
    first, seed by seed. `of`: what a row is."""
    rungs = _rungs(cells)
    headings = [of, "seeds", *(heading for heading, _, _ in COLUMNS)]
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    start = [cell for cell in cells if cell.rung == rungs[0] and cell.validations[0]["step"] == 0]
    if start:
        accuracies = [spread([cell.validations[0][key] for cell in start], ".3f") for key in (SAMPLED, GREEDY)]
        lines.append(f"| warm start | {len(start)} | {' | '.join(accuracies)} |" + " – |" * (len(COLUMNS) - 2))
    for rung in rungs:
        of_rung = [cell for cell in cells if cell.rung == rung]
        entries = [spread([value(cell) for cell in of_rung], form) for _, form, value in COLUMNS]
        lines.append(f"| {rung.name} | {len(of_rung)} | {' | '.join(entries)} |")
    below = _comparison(cells, rungs[0], rungs[-1]) if last_less_first else []
    return "\n".join([*lines, "", *below]).rstrip() + "\n"


def _comparison(cells: Sequence[Cell], first: Rung, last: Rung) -> list[str]:
    pairs = [(a, b) for a in cells for b in cells if a.rung == first != last and b.rung == last and a.seed == b.seed]
    if not pairs:
        return []
    seeds = " · ".join(str(a.seed) for a, _ in pairs)
    lines = [f"| {last.name} less {first.name} | seeds {seeds} | mean ± deviation |", "|---|---|---|"]
    for heading, form, value in COLUMNS[:COMPARED]:
        differences = [value(b) - value(a) for a, b in pairs]
        each = " · ".join(format(difference, "+" + form) for difference in differences)
        lines.append(f"| {heading} | {each} | {spread(differences, '+' + form)} |")
    return lines


def rows_csv(cells: Sequence[Cell]) -> str:
    """A row a validation: accuracies, means of the other columns over the steps since the one before, tokens so far."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rung", "seed", "step", "accuracy", "accuracy_greedy", *ROW_MEANS, *ROW_SUMS])
    for cell in cells:
        before = 0
        for line in cell.validations:
            here = [i for i, step in enumerate(cell.steps) if before < step["step"] <= line["step"]]
            means = [_mean([cell.values(key)[i] for i in here]) if here else None for key in ROW_MEANS.values()]
            sums = [
                sum(
                    value or 0
                    for value, step in zip(cell.values(key), cell.steps, strict=True)
                    if step["step"] <= line["step"]
                )
                for key in ROW_SUMS.values()
            ]
            numbers = [line[SAMPLED], line.get(GREEDY), *means]
            writer.writerow(
                [cell.rung.recipe, cell.seed, line["step"]]
                + ["" if number is None or math.isnan(number) else f"{number:.4f}" for number in numbers]
                + [f"{total:.0f}" for total in sums]
            )
            before = line["step"]
    return text.getvalue()


def draw_curves(cells: Sequence[Cell], path: Path) -> None:
    """Eight panels over rollout steps: a line a rung (mean over seeds), in a band of all seeds."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}), atomic_path(path) as temporary:
        figure = Figure(figsize=(16, 8), dpi=70, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 4).ravel()
        rungs = _rungs(cells)
        for place, (title, unit, key) in zip(axes, PANELS, strict=True):
            place.set_title(title)
            place.set_ylabel(unit)
            place.set_xlabel("rollout step")
            for i, rung in enumerate(rungs):
                style = (COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS)])
                _draw_rung(place, [curve(cell, key) for cell in cells if cell.rung == rung], rung, *style)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=min(len(rungs), 7))
        figure.savefig(temporary, format="png", pil_kwargs={"optimize": True})


def curve(cell: Cell, key: str) -> dict[int, float]:
    """step → value: validations as they are, tokens summed up (thousands), the rest as a running mean."""
    if key.startswith("validation/"):
        return {line["step"]: line[key] for line in cell.validations if key in line}
    values, steps = cell.values(key), [line["step"] for line in cell.steps]
    if key.startswith("tokens/"):
        return dict(zip(steps, (total / 1000 for total in accumulate(value or 0.0 for value in values)), strict=True))
    known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    return {
        step: statistics.fmean(value for _, value in known[max(0, i - SMOOTH_STEPS + 1) : i + 1])
        for i, (step, _) in enumerate(known)
    }


def _draw_rung(axes: Any, curves: list[dict[int, float]], rung: Rung, colour: str, line: Any) -> None:
    steps = sorted(set.intersection(*map(set, curves)))
    values = [[each[step] for each in curves] for step in steps]
    axes.plot(steps, [statistics.fmean(v) for v in values], color=colour, ls=line, label=rung.name)
    if len(curves) > 1:
        axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.12, lw=0)


def _rungs(cells: Sequence[Cell]) -> list[Rung]:
    return sorted({cell.rung for cell in cells}, key=lambda rung: rung.recipe)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else float("nan")


def spread(values: Sequence[float], form: str) -> str:
    """mean ± standard deviation over the seeds; of one seed its value, a dash where a value is missing."""
    if any(math.isnan(value) for value in values):
        return "–"
    mean = format(statistics.fmean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {format(statistics.stdev(values), form.lstrip('+'))}"
