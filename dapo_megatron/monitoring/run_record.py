"""What a finished or running run left in its directory, read for the report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo_megatron.errors import RequestError
from dapo_megatron.monitoring.metrics import read_metrics

Series = tuple[list[float], list[float]]  # steps, values; NaN where the run recorded null
SUPERVISED_LOSS_KEYS = ("loss", "loss/supervised", "supervised/loss")


@dataclass(frozen=True)
class RunRecord:
    """One run: label in plots, recipe as text, metrics in step order, supervised lines, sample completions."""

    label: str
    config: str
    metrics: list[dict[str, Any]]
    supervised: list[dict[str, Any]]
    samples: list[dict[str, Any]]

    def series(self, key: str) -> Series:
        """Steps and values of the rollout steps that recorded `key`."""
        rows = [row for row in self.metrics if key in row]
        return [float(row["step"]) for row in rows], [_number(row[key]) for row in rows]

    def supervised_loss(self) -> Series:
        """Supervised steps, counted on across stages that each start anew, and their losses."""
        steps: list[float] = []
        losses: list[float] = []
        before = 0.0  # steps of the stages that ended
        previous = -math.inf
        for row in self.supervised:
            key = next((key for key in SUPERVISED_LOSS_KEYS if key in row), None)
            if key is None:
                continue
            step = _number(row["supervised_step"])
            if step <= previous:
                before = steps[-1]
            previous = step
            steps.append(before + step)
            losses.append(_number(row[key]))
        return steps, losses


def read_runs(run_directories: Sequence[Path]) -> list[RunRecord]:
    """Read run directories; labels are the shortest path endings that tell them apart.

    Raises RequestError for an empty list, a folder without metrics.jsonl, or a broken line in one of the files.
    """
    folders = [Path(folder) for folder in run_directories]
    if not folders:
        raise RequestError("a report needs at least one run directory")
    for folder in folders:
        if not (folder / "metrics.jsonl").is_file():
            raise RequestError(_no_metrics(folder))
    return [_read(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)]


def _read(folder: Path, label: str) -> RunRecord:
    # a step that was run twice counts as it went last
    by_step = {row["step"]: row for row in read_metrics(folder / "metrics.jsonl") if _is_step(row.get("step"))}
    config = folder / "config.yaml"
    return RunRecord(
        label=label,
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
        metrics=[by_step[step] for step in sorted(by_step)],
        supervised=[row for row in _optional(folder / "supervised.jsonl") if _is_step(row.get("supervised_step"))],
        samples=_optional(folder / "samples.jsonl"),
    )


def _optional(path: Path) -> list[dict[str, Any]]:
    return read_metrics(path) if path.is_file() else []


def _no_metrics(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder; give the run.directory of a run"
    inside = sorted(path.parent for path in folder.glob("*/metrics.jsonl"))
    hint = f"did you mean {inside[0]}?" if inside else "give the run.directory of a run that has started"
    return f"{folder} has no metrics.jsonl; {hint}"


def _labels(folders: list[Path]) -> list[str]:
    paths = [folder.resolve().parts for folder in folders]
    depth = 1
    while depth < max(map(len, paths)) and len({path[-depth:] for path in paths}) < len(set(paths)):
        depth += 1
    return ["/".join(path[-depth:]) for path in paths]


def _is_step(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
