"""What a judge was asked and what it said, in a parquet file that grows with a run: `reward.judge.collect`.

Columns: question, answer (the final answer as it was cut), reference, verdict ("YES" where P > 0.5, else "NO"), p_yes.
Each (question, answer, reference) stands there once, with the first verdict on it.
"""

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.files import atomic_path, locked
from dapo_megatron.rewards.judge_prompt import Case

TEXTS = ("question", "answer", "reference", "verdict")
COLUMNS = (*TEXTS, "p_yes")

LOCK_LIMIT_S = 60.0  # for another run that writes the same file


@dataclass(frozen=True)
class Judged:
    """A case with its verdict; p_yes = P(YES) / (P(YES) + P(NO))."""

    case: Case
    p_yes: float

    @property
    def verdict(self) -> str:
        return "YES" if self.p_yes > 0.5 else "NO"


class JudgeRecords:
    """The rows of a file and what comes after them; a file that is there already is gone on with, and what another
    run has written into it since is kept.

    Raises:
        RequestError: as `read_judged`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows = first_of_each(read_judged(path) if path.exists() else [])
        self._written = len(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, judged: Iterable[Judged]) -> None:
        """Remember what is not there yet."""
        for row in judged:
            self._rows.setdefault(row.case, row)

    def write(self) -> None:
        """Write the file, whole or not at all, if there is something new; the rows that stand in it go first.

        Raises:
            RunError: the disk is full, the file cannot be written, holds something else by now, or another run has not
                done with it in a minute.
        """
        if len(self._rows) == self._written:
            return
        try:
            with locked(self._path, LOCK_LIMIT_S):
                on_disk = read_judged(self._path) if self._path.exists() else []
                self._rows = first_of_each([*on_disk, *self._rows.values()])
                write_judged(self._path, self._rows.values())
        except (OSError, RequestError) as error:
            raise RunError(f"reward.judge.collect={self._path} cannot be written: {error}") from error
        self._written = len(self._rows)


def first_of_each(rows: Iterable[Judged]) -> dict[Case, Judged]:
    """Every case once, with its first verdict, in their order."""
    found: dict[Case, Judged] = {}
    for row in rows:
        found.setdefault(row.case, row)
    return found


def write_judged(path: Path, rows: Iterable[Judged]) -> None:
    """Write a file of judged cases, whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    rows = list(rows)
    columns = {name: pyarrow.array([getattr(row.case, name) for row in rows], pyarrow.string()) for name in TEXTS[:3]}
    columns["verdict"] = pyarrow.array([row.verdict for row in rows], pyarrow.string())
    columns["p_yes"] = pyarrow.array([row.p_yes for row in rows], pyarrow.float64())
    with atomic_path(path) as temporary:
        pyarrow.parquet.write_table(pyarrow.table(columns), temporary)


def read_judged(path: Path) -> list[Judged]:
    """The rows of a file of judged cases.

    Raises:
        RequestError: no such file, no parquet, other columns, a P(YES) that is none.
    """
    import pyarrow
    import pyarrow.parquet

    _check_columns(path)
    try:
        rows = pyarrow.parquet.read_table(path, columns=list(COLUMNS)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise RequestError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    for number, row in enumerate(rows):
        if not all(isinstance(row[name], str) for name in TEXTS) or not _is_share(row["p_yes"]):
            raise RequestError(f"{path}, row {number} (from 0): {row} is no judged case")
    return [Judged(Case(row["question"], row["answer"], row["reference"]), row["p_yes"]) for row in rows]


def check_collect(path: Path) -> None:
    """Refuse a `reward.judge.collect` that could not be written, or that holds something else.

    Raises:
        RequestError: no .parquet name, a folder, none to write it in, a file with other columns.
    """
    if path.suffix != ".parquet":
        raise RequestError(f"reward.judge.collect={path} must end in .parquet")
    if path.is_dir():
        raise RequestError(f"reward.judge.collect={path} is a folder; name a file in it")
    nearest = next((folder for folder in path.parents if folder.exists()), Path())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise RequestError(
            f"reward.judge.collect={path} could not be written: {nearest} is no folder that may be written to; name a "
            "file in one that is"
        )
    if path.exists():
        _check_columns(path)


def _check_columns(path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    try:
        names = pyarrow.parquet.read_schema(path).names
    except (pyarrow.ArrowException, OSError) as error:
        raise RequestError(f"{path} is no parquet file that can be read: {str(error).splitlines()[0]}") from None
    if not set(COLUMNS) <= set(names):
        raise RequestError(
            f"{path} holds the columns {', '.join(names)}; a file of judged cases has {', '.join(COLUMNS)}: use "
            "another name"
        )


def _is_share(value: object) -> bool:
    return isinstance(value, float) and math.isfinite(value) and 0 <= value <= 1
