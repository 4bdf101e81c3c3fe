"""What every benchmark tells of itself: the machine, the commit, its rows as a CSV file and as a table."""

import csv
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dapo_megatron.files import atomic_path

ROOT = Path(__file__).resolve().parent.parent


def processor() -> str:
    """The name of the first core, or of the architecture where the system does not tell it."""
    path = Path("/proc/cpuinfo")
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def commit() -> str:
    """The commit that stands here, with "-dirty" where files differ from it; empty outside a repository."""
    found = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip()


def machine(load: float) -> dict[str, Any]:
    """Columns `machine`, `cores`, `load`, `commit`; load: processes that wanted a core before the run."""
    return {"machine": processor(), "cores": os.cpu_count() or 0, "load": load, "commit": commit()}


def quantile(values: Sequence[float], share: float) -> float:
    """The measured value nearest to that share of the sorted values."""
    return sorted(values)[min(len(values) - 1, round(share * (len(values) - 1)))]


def write_rows(rows: Sequence[Any], path: Path) -> None:
    """Dataclass records of one kind as CSV: a column a field, floats to four digits, None as nothing."""
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = [field.name for field in fields(rows[0])]
        writer.writerow(names)
        for row in rows:
            values = (getattr(row, name) for name in names)
            writer.writerow([f"{v:.4g}" if isinstance(v, float) else "" if v is None else v for v in values])


def print_table(heads: Sequence[str], lines: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """Columns of one width each; the first `left` begin at their left edge, the others end at their right."""
    widths = [max(len(line[i]) for line in (heads, *lines)) for i in range(len(heads))]
    for line in (heads, *lines):
        cells = (
            word.ljust(width) if i < left else word.rjust(width)
            for i, (word, width) in enumerate(zip(line, widths, strict=True))
        )
        print("  ".join(cells))
