"""What a person sees while the run goes on: one plain line a step, or a live display on a terminal."""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, TextIO

from dapo_megatron.monitoring import step_text

SUPERVISED_LINES = 20  # plain lines a supervised stage prints
SPARKLINE_STEPS = 60
REFRESH_HZ = 2  # each refresh takes time from the learner


class Console:
    """Prints the progress of a run of `total_steps` rollout steps to `stream` (default: standard output).

    `quiet`: plain lines, one a step; None: plain unless `stream` is a terminal. Use it as a context manager, or call
    `close`, to give the terminal back. A stream that goes away (a closed pipe) silences the console and does not end
    the run.
    """

    def __init__(
        self,
        total_steps: int,
        quiet: bool | None = None,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        stream = stream or sys.stdout
        if quiet is None:
            quiet = not stream.isatty() or os.environ.get("TERM", "") in ("dumb", "unknown")
        self._total = total_steps
        self._form: _Form = _PlainForm(stream) if quiet else _LiveForm(stream, clock)
        self._pace = step_text.Pace(total_steps, clock)
        self._gone = False

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Show a rollout step; `metrics` has the keys of metrics.jsonl, any of which may be missing."""
        step = int(metrics.get("step", 0))
        eta = self._pace.eta(step, step_text.number(metrics, "time/step"))
        self._show(lambda: self._form.step(step, self._total, metrics, eta))

    def supervised(self, step: int, total: int, loss: float, seconds: float) -> None:
        """Show supervised step `step` (from 1) of `total`, which took `seconds`; the plain form prints about 20."""
        self._show(lambda: self._form.supervised(step, total, loss, seconds))

    def note(self, text: str) -> None:
        """Print `text` as it is; control characters in it are spelled out."""
        self._show(lambda: self._form.line(step_text.printable(text), None))

    def alert(self, text: str) -> None:
        """Print `text` so that it stands out."""
        self._show(lambda: self._form.line(f"ALERT  {step_text.printable(text)}", "bold red"))

    def close(self) -> None:
        """End the display; a second call does nothing."""
        self._show(self._form.close)

    def __enter__(self) -> "Console":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _show(self, action: Callable[[], None]) -> None:
        if self._gone:
            return
        try:
            action()
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and "closed file" not in str(error):
                raise
            self._gone = True


class _Form(Protocol):
    def step(self, step: int, total: int, metrics: Mapping[str, Any], eta: float | None) -> None: ...

    def supervised(self, step: int, total: int, loss: float, seconds: float) -> None: ...

    def line(self, text: str, style: str | None) -> None: ...

    def close(self) -> None: ...


class _PlainForm:
    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def step(self, step: int, total: int, metrics: Mapping[str, Any], eta: float | None) -> None:
        parts = [f"step {step:>{len(str(total))}}/{total}"]
        parts += [f"{label} {value}" for label, value in step_text.quality(metrics) + step_text.pace(metrics)]
        if eta is not None:
            parts.append(f"ETA {step_text.duration(eta)}")
        self.line("  ".join(parts), None)

    def supervised(self, step: int, total: int, loss: float, seconds: float) -> None:
        every = max(1, total // SUPERVISED_LINES)
        if step in (1, total) or step % every == 0:
            left = f"  ETA {step_text.duration((total - step) * seconds)}" if step < total else ""
            self.line(
                f"supervised {step:>{len(str(total))}}/{total}  loss {loss:.4f}  {seconds:.2f}s a step{left}", None
            )

    def line(self, text: str, style: str | None) -> None:
        encoding = self._stream.encoding or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=self._stream, flush=True)

    def close(self) -> None:
        pass


class _LiveForm:
    """A bar, the latest numbers, the curve of the training accuracy; validations, notes and alerts scroll above."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        from rich.console import Console as RichConsole

        self._rich = RichConsole(file=stream, highlight=False, markup=False, emoji=False)
        self._clock = clock
        self._began = clock()
        self._live: Any = None
        self._kind = ""
        self._heading = ""
        self._done, self._total = 0, 1
        self._eta: float | None = None
        self._shown_at = self._began
        self._rows: list[list[tuple[str, str]]] = []
        self._accuracy: deque[float] = deque(maxlen=SPARKLINE_STEPS)

    def step(self, step: int, total: int, metrics: Mapping[str, Any], eta: float | None) -> None:
        accuracy = step_text.number(metrics, "accuracy/train")
        if accuracy is not None:
            self._accuracy.append(accuracy)
        self._progress("step", step, total, eta, [step_text.quality(metrics), step_text.pace(metrics)])
        checked = step_text.validation(metrics)
        if checked:
            self.line(f"step {step}/{total}  " + "  ".join(f"{label} {value}" for label, value in checked), "green")

    def supervised(self, step: int, total: int, loss: float, seconds: float) -> None:
        left = (total - step) * seconds
        self._progress("supervised", step, total, left, [[("loss", f"{loss:.4f}"), ("a step", f"{seconds:.2f}s")]])
        if step == total:
            self.line(f"supervised {total}/{total}  loss {loss:.4f}", "green")

    def line(self, text: str, style: str | None) -> None:
        from rich.text import Text

        encoding = self._rich.encoding
        self._rich.print(Text(text.encode(encoding, "backslashreplace").decode(encoding), style=style or ""))

    def close(self) -> None:
        if self._live is not None:
            self._eta = None
            self._live.stop()
            self._live = None

    def _progress(self, kind: str, step: int, total: int, eta: float | None, rows: list[list[tuple[str, str]]]) -> None:
        from rich.live import Live

        self._heading, self._done, self._total = f"{kind} {step}/{total}", step, max(1, total)
        self._eta, self._shown_at, self._rows = eta, self._clock(), rows
        if self._live is None:
            # drawn anew by a thread, so that the clock goes on during a long step
            self._live = Live(self, console=self._rich, refresh_per_second=REFRESH_HZ)
            self._live.start()
        self._live.refresh()

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        head = Table.grid(padding=(0, 2))
        now = self._clock()
        cells: list[Any] = [
            Text(self._heading, style="bold"),
            ProgressBar(total=self._total, completed=min(self._done, self._total), width=32),
            Text(f"{step_text.duration(now - self._began)} elapsed", style="dim"),
        ]
        if self._eta is not None:
            cells.append(Text(f"ETA {step_text.duration(max(0.0, self._eta - (now - self._shown_at)))}", style="dim"))
        head.add_row(*cells)
        lines: list[Any] = [head]
        for row in self._rows:
            text = Text()
            for label, value in row:
                text.append(f"{label} ", style="dim").append(f"{value}  ")
            lines.append(text)
        if len(self._accuracy) > 1:
            curve = step_text.sparkline(list(self._accuracy))
            lines.append(Text("train accuracy ", style="dim").append(curve, style="cyan"))
        return Group(*lines)
