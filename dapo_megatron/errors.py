"""The two ways a command can fail, and the exit code of each."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class RequestError(Exception):
    """The request is wrong: bad setting, missing file, sizes that do not divide. Printed as is, exit code 2."""

    exit_code = 2


class RunError(Exception):
    """The request was sound and something failed while it ran. Printed as is, exit code 1."""

    exit_code = 1


@contextmanager
def exit_with_message() -> Iterator[None]:
    """Turn both errors into their message on standard error and their exit code, without a traceback.

    In a world a wrong request is the same on every rank, so rank 0 alone tells it.
    """
    try:
        yield
    except (RequestError, RunError) as error:
        if isinstance(error, RunError) or os.environ.get("RANK", "0") == "0":
            print(f"dapo-megatron: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
