"""Replies of a model kept in a file as they come, so that a killed run goes on without asking again.

The first line names the model; each further line is one finished item {key, question, answer, rewrite, agreement,
outcome}. Replies are kept raw and checked again when they are read: the file decides nothing.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo_megatron.errors import RequestError

FORM = 1


@dataclass(frozen=True)
class Replies:
    """What the model said about one item; agreement None when it was not asked."""

    rewrite: str
    agreement: str | None


def journal_key(*texts: str) -> str:
    """The name of an item: SHA-256 of all that its replies depend on."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


class ReplyJournal:
    """The journal at `path`, begun or continued. A line that a killed run left unfinished is dropped.

    Raises:
        RequestError: the file is no journal, or one of another model.
    """

    def __init__(self, path: Path, model: str) -> None:
        self.path = path
        self.finished: dict[str, Replies] = {}
        header = {"journal": FORM, "model": model}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._read(header) if path.exists() else 0
        self._file = open(path, "ab")  # noqa: SIM115 open for as long as this object
        self._file.truncate(whole)
        if whole == 0:
            self._write(header)

    def add(self, key: str, replies: Replies, told: dict[str, str]) -> None:
        """Keep the replies of an item; `told` is for people."""
        self._write({"key": key, **told, "rewrite": replies.rewrite, "agreement": replies.agreement})
        self.finished[key] = replies

    def flush(self) -> None:
        """To disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Flush and close."""
        self.flush()
        self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")

    def _read(self, header: dict[str, Any]) -> int:
        """Take in all whole lines; returns their length in bytes."""
        whole = 0
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines):
                if not line.endswith(b"\n"):
                    break
                record = self._parse(line, number)
                if number == 0:
                    self._check(record, header)
                else:
                    self.finished[record["key"]] = Replies(record["rewrite"], record["agreement"])
                whole += len(line)
        return whole

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        try:
            record = json.loads(line)
            if number:
                texts = isinstance(record["key"], str) and isinstance(record["rewrite"], str)
                if not (texts and isinstance(record["agreement"], str | None)):
                    raise ValueError("not a record of replies")
            return record
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise RequestError(
                f"{self.path}, line {number + 1}: {error}; delete the line, or the file to begin anew"
            ) from None

    def _check(self, record: Any, header: dict[str, Any]) -> None:
        if not isinstance(record, dict) or record.get("journal") != FORM:
            raise RequestError(f"{self.path} is no journal of replies; choose another output")
        if record != header:
            raise RequestError(
                f"{self.path} holds replies of {record.get('model')}, and {header['model']} is asked now; "
                "choose another output, or delete the file to begin anew"
            )
