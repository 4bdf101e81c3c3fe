"""Sums that span the ranks: what the last pipeline stage knows of its tokens, made known to all."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


def speaks_for_its_tokens() -> bool:
    """True on one rank for each token, by the groups in force: last pipeline stage, first tensor-parallel rank."""
    return (
        parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        and parallel_state.get_tensor_model_parallel_rank() == 0
    )


def sum_over_world(values: Tensor) -> Tensor:
    """Σ of `values` over the speaking ranks, on every rank; exact where only one of them is not 0."""
    if not speaks_for_its_tokens():
        values = torch.zeros_like(values)
    if dist.get_world_size() > 1:
        values = values.contiguous()
        dist.all_reduce(values)
    return values


def sum_over_context(values: Tensor) -> Tensor:
    """Σ of `values` over the context-parallel ranks, on all of them; differentiable, of the sum of their losses."""
    return _SumOverContext.apply(values)


class _SumOverContext(torch.autograd.Function):
    @staticmethod
    def forward(_: object, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=parallel_state.get_context_parallel_group())
        return total

    @staticmethod
    def backward(_: object, gradient: Tensor) -> Tensor:
        # what this rank put in is in the losses of all ranks
        return _SumOverContext.forward(None, gradient)


def largest_each(values: Sequence[float], device: torch.device) -> list[float]:
    """Of each of `values` the largest that a rank of the world has, on every rank; none may be NaN."""
    found = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.get_world_size() > 1:
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found.tolist()


def largest_of_ranks(number: int, device: torch.device) -> int:
    """The largest `number` that a rank of the world has, on every rank."""
    return int(largest_each([number], device)[0])
