"""The hidden folder beside a destination in which a conversion grows, and its journal of finished files.

    .NAME.converting/
        journal.jsonl    the request, then one line a finished file: name, bytes, SHA-256, what a writer adds
        content/         becomes NAME when all is there

A conversion that was killed goes on from the files that its journal lists and that still have their sums.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.files import write_text_atomically


class Workspace:
    """Files of an unfinished destination."""

    def __init__(self, destination: Path, journal: IO[str], finished: dict[str, dict]) -> None:
        self.destination, self.finished, self._journal = destination, finished, journal
        self.folder = workspace_folder(destination)
        self.content = self.folder / "content"

    @property
    def bytes_finished(self) -> int:
        return sum(entry["bytes"] for entry in self.finished.values())

    def record(self, name: str, *, bytes: int, sha256: str, **more: object) -> None:
        """Note that the file is complete and on disk."""
        self.finished[name] = {"file": name, "bytes": bytes, "sha256": sha256, **more}
        self._journal.write(json.dumps(self.finished[name]) + "\n")
        self._journal.flush()
        os.fsync(self._journal.fileno())

    def publish(self) -> None:
        """Give the content its final name.

        Raises:
            RunError: something of that name has appeared meanwhile.
        """
        if self.destination.exists():
            raise RunError(f"{self.destination} appeared meanwhile; the result is in {self.content}")
        os.rename(self.content, self.destination)
        self.discard()

    def discard(self) -> None:
        """Delete the workspace."""
        shutil.rmtree(self.folder)


def workspace_folder(destination: Path) -> Path:
    """Where a conversion to `destination` grows."""
    return destination.with_name(f".{destination.name}.converting")


def finished_bytes(destination: Path, request: dict) -> int:
    """Bytes that the journal of an interrupted, equal conversion lists; writes nothing."""
    entries = _entries(workspace_folder(destination) / "journal.jsonl", request)
    return sum(entry["bytes"] for entry in entries.values())


@contextmanager
def open_workspace(destination: Path, request: dict) -> Iterator[Workspace]:
    """The workspace of `destination`, for this process alone. Files of an earlier, equal request are taken over if
    they are whole; all else in it is deleted.

    Raises:
        RequestError: another process is converting to this destination.
    """
    folder = workspace_folder(destination)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "journal.jsonl"
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RequestError(f"another process is converting to {destination}; wait for it or name another") from None
        content = folder / "content"
        content.mkdir(exist_ok=True)
        finished = {name: entry for name, entry in _entries(path, request).items() if _whole(content / name, entry)}
        for found in sorted(content.rglob("*"), reverse=True):
            if found.is_dir() and not any(found.iterdir()):
                found.rmdir()
            elif not found.is_dir() and str(found.relative_to(content)) not in finished:
                found.unlink()
        lines = [{"request": request}, *finished.values()]
        write_text_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
        with open(path, "a", encoding="utf-8") as journal:
            yield Workspace(destination, journal, finished)
    finally:
        os.close(lock)


def _entries(journal: Path, request: dict) -> dict[str, dict]:
    """Finished files of the journal by name; none if it is of another request."""
    try:
        lines = journal.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return {}
    found: dict[str, dict] = {}
    for i, line in enumerate(lines):
        try:
            entry = json.loads(line)
            if i == 0 and entry != {"request": request}:
                return {}
            if i > 0:
                found[entry["file"]] = {**entry, "bytes": int(entry["bytes"])}
        except (ValueError, LookupError, TypeError):
            break  # the line during which the process was killed
    return found


def _whole(path: Path, entry: dict) -> bool:
    if not path.is_file() or path.stat().st_size != entry["bytes"]:
        return False
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest() == entry["sha256"]
