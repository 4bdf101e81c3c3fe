"""A file being written: hashed on the way, and a full disk told as such."""

import errno
import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dapo_megatron.errors import RunError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


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


@contextmanager
def hashed_file(path: Path, *, needed: int, shown: Path) -> Iterator[HashedFile]:
    """Write `path` (told as `shown` in messages), `needed` bytes or so; flushed to disk at the end.

    Raises:
        RunError: the disk is full, or the file may not grow further.
    """
    file = None
    try:
        file = HashedFile(path)
        yield file
        file.sync()
    except (OSError, RuntimeError) as error:
        cause = file.failure if file is not None and file.failure is not None else error
        if not isinstance(cause, OSError) or cause.errno not in FULL:
            raise
        done = file.bytes if file is not None else 0
        raise RunError(
            f"cannot write {shown}: {cause.strerror} after {done} of about {needed} bytes "
            f"({shutil.disk_usage(path.parent).free} bytes are free); make room and give the same command again: "
            "it goes on from the finished files"
        ) from None
    finally:
        if file is not None:
            file.close()
