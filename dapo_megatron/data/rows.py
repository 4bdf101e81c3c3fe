"""Rows of data files: .jsonl, .parquet, .json (a list of objects), and data sets of a hub under `hub:` names."""

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dapo_megatron.data.hub import PREFIX, hub_files
from dapo_megatron.errors import RequestError

EXTENSIONS = (".jsonl", ".parquet", ".json")


def read_rows(path: str | Path, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, row) for every row of a file, or of all files of a hub name; `where` names file and row for people.

    Blank lines of a jsonl file are skipped. Of a parquet file only `columns` (with what is nested in them) are read.

    Raises:
        RequestError: no such file, an unknown extension, a broken row or file, a hub that gives no such data.
    """
    if str(path).startswith(PREFIX):
        for file in hub_files(str(path), EXTENSIONS):
            yield from read_rows(file, columns)
        return
    check_data_file(path)
    path = Path(path)
    try:
        if path.suffix == ".parquet":
            yield from _parquet_rows(path, columns)
        else:
            yield from _jsonl_rows(path) if path.suffix == ".jsonl" else _json_rows(path)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error}") from error


def check_data_file(path: str | Path, setting: str | None = None) -> None:
    """Refuse what `read_rows` would not open; hub names pass. `setting`: the recipe key that named it.

    Raises:
        RequestError: no such file, an unknown extension.
    """
    if str(path).startswith(PREFIX):
        return
    path, named = Path(path), f"{setting}={path}" if setting else str(path)
    if path.suffix not in EXTENSIONS:
        raise RequestError(
            f"{named}: unknown extension {path.suffix!r}; use {', '.join(EXTENSIONS[:-1])} or {EXTENSIONS[-1]}"
        )
    if not path.is_file():
        seen = f" in {Path.cwd()}" if setting and not path.is_absolute() else ""
        raise RequestError(f"{named}: no such file{seen}")


def pick_column(row: Mapping[str, Any], name: str, setting: str | None, where: str) -> Any:
    """The value of a column; dots reach into nested ones unless a column of that very name exists.

    Raises:
        RequestError: no such column, with the nearest name; `setting` is the recipe key that asked for it.
    """
    if name in row:
        return row[name]
    value: Any = row
    above = ""
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            asked = f"{setting}={name}" if setting else name
            inside = value if isinstance(value, Mapping) else {}
            near = difflib.get_close_matches(part if above else name, map(str, inside), n=1)
            has = f"{above.removesuffix('.') or 'the row'} has {', '.join(map(str, inside)) or 'no columns'}"
            advice = f"use {above}{near[0]}" if near else has
            raise RequestError(f"{where}: no column {asked}; {advice}")
        value, above = value[part], f"{above}{part}."
    return value


def shown(value: Any) -> str:
    """Type and value for a message, cut to 60 characters."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            yield where, _object(_parse(line, where), where)


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    rows = _parse(path.read_bytes(), str(path))
    if not isinstance(rows, list):
        raise RequestError(f"{path}: must be a JSON list of objects, not {shown(rows)}")
    for number, row in enumerate(rows):
        where = f"{path}, row {number} (from 0)"
        yield where, _object(row, where)


def _parse(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}: not valid JSON: {error}") from error


def _object(row: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise RequestError(f"{where}: must be a JSON object, not {shown(row)}")
    return row


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            present = file.schema_arrow.names
            wanted = [
                name for name in present if any(name == column or column.startswith(f"{name}.") for column in columns)
            ]
            # without rows no row can show that a column is missing
            if file.metadata.num_rows == 0:
                return
            number = 0
            for batch in file.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    # the columns left unread are still worth naming when one is missing
                    yield f"{path}, row {number} (from 0)", dict.fromkeys(present) | row
                    number += 1
    except pyarrow.ArrowException as error:
        raise RequestError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from error
