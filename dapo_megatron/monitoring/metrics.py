"""metrics.jsonl: one JSON object a line, appended while the run goes on, readable at any moment."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dapo_megatron.errors import RequestError
from dapo_megatron.files import atomic_path


class MetricsFile:
    """Appends objects to a JSON-lines file; each is on its way to disk when `append` returns.

    The file is opened for each line, so it may be rewritten in between (`truncate_after`). A line that an earlier
    process left cut in the middle is removed before the next one is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Write one line: floats with every digit, NaN and infinities as null, numpy and torch values as plain ones."""
        line = json.dumps({str(key): _plain(value) for key, value in metrics.items()}, allow_nan=False) + "\n"
        with open(self.path, "ab+") as handle:
            _mend_tail(handle)
            handle.write(line.encode("ascii"))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file, in order; a last line cut in the middle is left out.

    Raises RequestError for a missing file and for any other line that is not a JSON object.
    """
    return [record for _, record in _records(Path(path))]


def truncate_after(path: Path, step: int, key: str = "step") -> None:
    """Keep the lines whose `key` is at most `step`, and those without it; the rest goes. The file is replaced whole.

    For resuming from the checkpoint of `step`. A missing file stays missing. Raises RequestError for a broken line.
    """
    path = Path(path)
    if not path.exists():
        return
    kept = [line for line, record in _records(path) if not _is_after(record.get(key), step)]
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(line + b"\n" for line in kept))


def finite_number(metrics: Mapping[str, Any], key: str) -> float | None:
    """The value of `key`; None when it is missing, no number, NaN or infinite."""
    value = metrics.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    filled = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    for place, (number, line) in enumerate(filled):
        record = _parse(line)
        if record is not None:
            yield line, record
        elif place < len(filled) - 1:
            raise RequestError(f"{path} line {number} is not a JSON object; remove that line")


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, or not UTF-8
        return None
    return record if isinstance(record, dict) else None


def _is_after(value: Any, step: int) -> bool:
    return isinstance(value, int | float) and value > step


def _mend_tail(handle: Any) -> None:
    end = handle.seek(0, os.SEEK_END)
    if end == 0:
        return
    handle.seek(end - 1)
    if handle.read(1) == b"\n":
        return
    handle.seek(0)
    content = handle.read()
    start = content.rfind(b"\n") + 1
    if _parse(content[start:]) is None:
        handle.truncate(start)
    else:
        handle.write(b"\n")


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
