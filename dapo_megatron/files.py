"""Files appear whole under their final name or not at all."""

import errno
import fcntl
import hashlib
import io
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no room for what is to be written


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`: flushed to disk and renamed to `path` on success, removed on error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, time_limit_s: float) -> Iterator[None]:
    """Inside, no other process that asks for the lock of `path` has it: for reading it, adding, writing it anew. The
    lock is a file beside it, gone afterwards; what a killed process leaves of it holds up nobody.

    Raises:
        TimeoutError: another process still has it after `time_limit_s`.
    """
    lock = path.with_name(f".{path.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + time_limit_s
    while (handle := _taken(lock)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"another process has had {lock} for {time_limit_s:g} s")
        time.sleep(0.05)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)  # still held: who waits for it finds another file under its name
        os.close(handle)


def _taken(lock: Path) -> int | None:
    """An open file that holds the lock, None while another has it."""
    handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), os.stat(lock)):
            return handle
    except (BlockingIOError, FileNotFoundError):  # held, or its name gone since
        pass
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return None


def write_text_atomically(path: Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def replace_folder(temporary: Path, folder: Path) -> None:
    """Give `temporary` the name `folder`; an earlier folder of that name is set aside first and deleted last."""
    aside = folder.with_name(f".{folder.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if folder.exists():
        folder.rename(aside)
    temporary.rename(folder)
    shutil.rmtree(aside, ignore_errors=True)


def sync_tree(folder: Path) -> None:
    """Wait until the disk has every file of `folder`, at any depth, and the folders themselves."""
    for path in (*folder.rglob("*"), folder):
        sync_path(path)


def sync_path(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class HashedFile(io.RawIOBase):
    """Appends to a new file at `path`; counts and hashes (SHA-256) what is written, and remembers why it failed."""

    def __init__(self, path: Path) -> None:
        self.path, self.bytes, self.failure = path, 0, None
        self._sum = hashlib.sha256()
        self._raw = open(path, "wb", buffering=0)  # noqa: SIM115

    @property
    def sha256(self) -> str:
        return self._sum.hexdigest()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.bytes

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        self._sum.update(view)
        left = view
        while left:
            try:
                left = left[self._raw.write(left) :]
            except OSError as error:  # torch.save would report the position it wanted instead
                self.failure = error
                raise
        self.bytes += len(view)
        return len(view)

    def close(self) -> None:
        if not self._raw.closed:
            self._raw.close()
        super().close()

    def sync(self) -> None:
        """Wait until the disk has it."""
        os.fsync(self._raw.fileno())
