"""How good a student becomes with the number of cases that it learns from: which cases, which cells, which rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dapo_megatron.errors import RequestError
from dapo_megatron.judging.export import balanced
from dapo_megatron.rewards.judge_records import Judged

TARGETS = ("hard", "soft")
HEADINGS = ("targets", "cases", "accuracy", "AUC", "Brier", "ECE", "binary reward", "soft reward", "equals teacher")


@dataclass(frozen=True)
class Student:
    """One cell: trained on `size` cases with `targets` ("hard" or "soft")."""

    targets: str
    size: int

    @property
    def name(self) -> str:
        return f"{self.targets}-{self.size}"


def students(targets: Sequence[str], sizes: Sequence[int]) -> list[Student]:
    """All cells, small ones first.

    Raises:
        RequestError: a kind of targets that is none, a size that is odd or less than 2.
    """
    for kind in targets:
        if kind not in TARGETS:
            raise RequestError(f"--targets {kind} must be hard or soft")
    for size in sizes:
        if size < 2 or size % 2:
            raise RequestError(f"--sizes {size}: half of the cases are YES; use {max(2, size + size % 2)}")
    return [Student(kind, size) for size in sorted(set(sizes)) for kind in dict.fromkeys(targets)]


def nested(rows: Sequence[Judged], sizes: Sequence[int], seed: int) -> dict[int, list[Judged]]:
    """For each size so many cases, half of them YES; those of a smaller size are among those of a larger one.

    Raises:
        RequestError: as `balanced`; a size that exceeds the balanced cases.
    """
    even = balanced(rows, seed)
    largest = max(sizes)
    if largest > len(even):
        raise RequestError(
            f"--sizes {largest} exceeds the {len(even)} cases that are left of {len(rows)} with as many YES as NO; use "
            f"{len(even)} or less, or collect more"
        )
    rng = np.random.default_rng([seed, 5])
    sides = [[row for row in even if row.verdict == word] for word in ("YES", "NO")]
    drawn = [[side[i] for i in rng.permutation(len(side))] for side in sides]
    return {size: [row for side in drawn for row in side[: size // 2]] for size in sizes}


def rows_of(report: Mapping[str, Any], cells: Sequence[Student]) -> Iterator[tuple[str, ...]]:
    """The table under HEADINGS: the rule, the teacher where there is one, then each cell of a report of `calibrate`.

    The rewards' columns are their mean squared distance from the truth, as the rule's Brier is.
    """
    rule = report["rule"]
    yield ("rule", "", *_quality(rule), "", "", "")
    if "teacher" in report["judges"]:
        yield ("teacher", "", *_row(report["judges"]["teacher"]))
    for cell in cells:
        yield (cell.targets, str(cell.size), *_row(report["judges"][cell.name]))


def _row(judge: Mapping[str, Any]) -> tuple[str, ...]:
    rewards = (_number(judge["rewards"][mode]["brier"]) for mode in ("binary", "soft"))
    equal = judge.get("teacher", {}).get("equal")
    return (*_quality(judge["quality"]), *rewards, "" if equal is None else _number(equal))


def _quality(found: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(_number(found[name]) for name in ("accuracy", "auc", "brier", "ece"))


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"
