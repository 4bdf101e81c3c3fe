"""Values that the ranks of a run tell each other. Collective over the default group; a world of 1 needs none."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from dapo_megatron.errors import RequestError


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


def checked_on_rank_zero(check: Callable[[], None], rank: int, world: int) -> None:
    """Rank 0 calls `check`; its RequestError is raised on every rank, so that all of them end alike."""
    refusal = None
    if rank == 0:
        try:
            check()
        except RequestError as error:
            refusal = str(error)
    refusal = from_rank_zero(refusal, world)
    if refusal is not None:
        raise RequestError(refusal)
