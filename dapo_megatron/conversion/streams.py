"""A file being written: hashed on the way, and a full disk told as such."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dapo_megatron.errors import RunError
from dapo_megatron.files import FULL, HashedFile


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
