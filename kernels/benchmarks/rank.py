"""One rank of a split vocabulary, alone on its card: our ops go the way that they go there, statistics of all rows, one
gather (of one rank's), and the rest. A vocabulary that is whole is spared the gather, and a second reading of the
logits: another path, which must not stand for a rank's in a table."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from unittest import mock

import torch
import torch.distributed as dist
from dapo_kernels import linear_chunks, logprobs, policy_loss

COLUMNS_OF_A_RANK = (19008, 38016)  # 152,064 over 8 and over 4


@contextmanager
def as_a_rank(columns: int) -> Iterator[None]:
    """Within, the ops take `columns` for a rank's where it is one of COLUMNS_OF_A_RANK."""
    with ExitStack() as patches:
        if columns in COLUMNS_OF_A_RANK:
            alone = _group_of_one()
            for module in (policy_loss, logprobs, linear_chunks):
                patches.enter_context(mock.patch.object(module, "group_of_many", lambda _: alone))
        yield


@lru_cache(maxsize=1)
def _group_of_one() -> dist.ProcessGroup:
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD
