"""What the last pipeline stage does with the logits of a micro-batch: score them, or turn them into a loss.

Every loss divides by the weight sum of the whole global mini-batch and by nothing else, so that the split into
micro-batches and ranks does not show.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from dapo_kernels import clipped_policy_loss, logprobs_and_entropy
from torch import Tensor

from dapo_megatron.data.packing import PackedBatch

POLICY_SUMS = ("loss", "clip_low", "clip_high", "clip_dual", "ratio", "tokens")
SUPERVISED_SUMS = ("loss", "tokens")


@dataclass(frozen=True)
class RowLoss:
    """`compute`: (logits_TV, micro-batch) → (scalar loss, fp64 [width] sums to add over micro-batches, ranks)."""

    compute: Callable[[Tensor, PackedBatch], tuple[Tensor, Tensor]]
    width: int


@dataclass(frozen=True)
class Head:
    """What every op on the logits needs to know: true vocabulary, temperature, the group that shares the columns."""

    vocab: int
    temperature: float
    tensor_parallel_group: dist.ProcessGroup


def score_rows(head: Head, logits_TV: Tensor, batch: PackedBatch) -> Tensor:
    """fp32 [2, T]: log π(target) and entropy of each row with a loss weight, 0 elsewhere. No gradient."""
    with torch.no_grad():
        result = logprobs_and_entropy(
            logits_TV,
            batch.targets_T,
            temperature=head.temperature,
            vocab_size=head.vocab,
            tensor_parallel_group=head.tensor_parallel_group,
            row_mask=batch.loss_weights_T > 0,
        )
        return torch.stack([result.logprobs.float(), result.entropy.float()])


def policy_loss(
    head: Head,
    *,
    denominator: float,
    eps_low: float,
    eps_high: float,
    eps_dual: float | None,
    entropy_coefficient: float,
) -> RowLoss:
    """The clipped token-level policy loss (`dapo_kernels.clipped_policy_loss`); sums are POLICY_SUMS."""

    def loss(logits_TV: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        result = clipped_policy_loss(
            logits_TV,
            batch.targets_T,
            batch.old_logprobs_T,
            batch.advantages_T,
            batch.loss_weights_T,
            eps_low=eps_low,
            eps_high=eps_high,
            eps_dual=eps_dual,
            denominator=denominator,
            temperature=head.temperature,
            entropy_coefficient=entropy_coefficient,
            vocab_size=head.vocab,
            tensor_parallel_group=head.tensor_parallel_group,
        )
        sums = (
            result.loss.detach(),
            result.clipped_low.sum(),
            result.clipped_high.sum(),
            result.clipped_dual.sum(),
            result.ratio.sum(),
            (batch.loss_weights_T > 0).sum(),
        )
        return result.loss, torch.stack([value.double() for value in sums])

    return RowLoss(loss, len(POLICY_SUMS))


def supervised_loss(head: Head, *, denominator: float) -> RowLoss:
    """−Σ w·log π(target) / denominator; sums are SUPERVISED_SUMS."""

    def loss(logits_TV: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        trained = batch.loss_weights_T > 0
        logprobs = logprobs_and_entropy(
            logits_TV,
            batch.targets_T,
            temperature=head.temperature,
            vocab_size=head.vocab,
            tensor_parallel_group=head.tensor_parallel_group,
            row_mask=trained,
        ).logprobs
        value = -(batch.loss_weights_T * logprobs).sum() / denominator
        return value, torch.stack([value.detach().double(), trained.sum().double()])

    return RowLoss(loss, len(SUPERVISED_SUMS))
