"""The two ways a command can fail, and the exit code of each."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

FINAL = "DAPO_MEGATRON_FINAL"  # names the file by which a run tells a batch job that it need not be started again


class RequestError(Exception):
    """The request is wrong: bad setting, missing file, sizes that do not divide. Printed as is, exit code 2."""

    exit_code = 2
    on_every_rank = True
    lasting = True


class RunError(Exception):
    """The request was sound and something failed while it ran. Printed as is, exit code 1.

    `on_every_rank`: all ranks of the world raise it alike, so one of them tells it. `lasting`: the run would end in the
    same way if it were started again as it is.
    """

    exit_code = 1

    def __init__(self, message: str, *, on_every_rank: bool = False, lasting: bool = False) -> None:
        super().__init__(message)
        self.on_every_rank, self.lasting = on_every_rank, lasting


class Interrupted(RunError):
    """A request to stop came to some rank while all waited, for engines to start or for rollouts; raised on all."""

    def __init__(self) -> None:
        super().__init__("stopped while ranks waited for engines", on_every_rank=True)


@contextmanager
def exit_with_message() -> Iterator[None]:
    """Turn both errors, and failing files, into a message on standard error and an exit code, without a traceback."""
    try:
        yield
    except (RequestError, RunError) as error:
        if not error.on_every_rank or _rank() == 0:
            print(f"dapo-megatron: {error}", file=sys.stderr, flush=True)
        if error.lasting:
            tell_final(str(error))
        sys.exit(error.exit_code)
    except OSError as error:  # a full disk, a file that went away
        print(f"dapo-megatron: {error}", file=sys.stderr, flush=True)
        sys.exit(RunError.exit_code)


def tell_final(why: str) -> None:
    """Leave word for the batch job, if there is one, that a restart by itself would be in vain."""
    if path := os.environ.get(FINAL):
        with suppress(OSError):  # the run ends in any case
            Path(path).write_text(f"{why}\n", encoding="utf-8")


def _rank() -> int:
    in_step = "SLURM_STEP_ID" in os.environ
    return int(os.environ.get("RANK") or (in_step and os.environ.get("SLURM_PROCID")) or 0)
