"""How far a conversion is: a bar on a terminal, else a plain line now and then; and what the process has used."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

LINE_SECONDS = 10.0


class Counter:
    """Counts bytes of one phase; `advance` is cheap."""

    def __init__(self, what: str, total: int, bar: Progress | None) -> None:
        self.what, self.total, self.done, self._bar = what, total, 0, bar
        self._task = bar.add_task(what, total=total) if bar is not None else None
        self._told = time.monotonic()

    def advance(self, count: int) -> None:
        """`count` more bytes are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
        elif time.monotonic() - self._told >= LINE_SECONDS:
            self._told = time.monotonic()
            share = 100 * self.done / max(1, self.total)
            print(f"{self.what}: {self.done / 1e9:.1f} of {self.total / 1e9:.1f} GB, {share:.0f} %", file=sys.stderr)


@contextmanager
def counting(what: str, total: int) -> Iterator[Counter]:
    """A counter of `total` bytes, shown on standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Counter(what, total, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        yield Counter(what, total, bar)


def memory_bytes(key: str = "VmHWM") -> int | None:
    """A memory line of this process as Linux counts it: VmHWM the most that was resident, VmRSS what is; None where
    there is no such count."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
