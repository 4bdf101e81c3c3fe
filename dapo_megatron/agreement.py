"""Values that the ranks of a run tell each other. Collective over the default group; a world of 1 needs none."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from dapo_megatron.errors import RequestError, RunError


def everyone(value: Any, world: int) -> list[Any]:
    """The value of each rank, in rank order."""
    if world == 1:
        return [value]
    values: list = [None] * world
    dist.all_gather_object(values, value)
    return values


def from_rank_zero(value: Any, world: int) -> Any:
    """Rank 0's value; what the others give is not looked at."""
    box = [value]
    if world > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def done_on_rank_zero(work: Callable[[], Any] | None, world: int) -> Any:
    """What `work` returns on rank 0, which alone calls it; None where it has none.

    Raises:
        RunError: rank 0's, on every rank alike.
    """
    result, failure = _on_rank_zero(work, world, RunError)
    if failure is not None:
        raise RunError(failure, on_every_rank=True)
    return result


def checked_on_rank_zero(check: Callable[[], None], rank: int, world: int) -> None:
    """Rank 0 calls `check`; its RequestError is raised on every rank, so that all of them end alike."""
    _, refusal = _on_rank_zero(check if rank == 0 else None, world, RequestError)
    if refusal is not None:
        raise RequestError(refusal)


def _on_rank_zero(work: Callable[[], Any] | None, world: int, kind: type[Exception]) -> tuple[Any, str | None]:
    """Rank 0's result, and the words of an error of that kind that it raised, known to all."""
    result = told = None
    if work is not None:
        try:
            result = work()
        except kind as error:
            told = str(error)
    return from_rank_zero((result, told), world)
