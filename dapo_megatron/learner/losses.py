"""What the last pipeline stage does with a micro-batch: score it, or turn it into a loss.

A policy's output is the logits [T, V/TP], or, where the head's product is fused into the loss, the hidden states [T, H]
before it (T/TP rows a rank under sequence parallelism); `Head` knows which. A critic's is its values [T, 1].

Every loss divides by the weight sum of the whole global mini-batch and by nothing else, so that the split into
micro-batches and ranks does not show.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from dapo_kernels import (
    LogprobsAndEntropy,
    PolicyLoss,
    clipped_policy_loss,
    kl_estimate,
    linear_clipped_policy_loss,
    linear_logprobs_and_entropy,
    logprobs_and_entropy,
)
from torch import Tensor

from dapo_megatron.data.packing import PackedBatch

POLICY_SUMS = ("loss", "clip_low", "clip_high", "clip_dual", "ratio", "tokens", "kl_loss")
SUPERVISED_SUMS = ("loss", "tokens")
VALUE_SUMS = ("loss", "clipped", "tokens")


@dataclass(frozen=True)
class RowLoss:
    """`compute`: (output, micro-batch) → (scalar loss, fp64 [width] sums to add over micro-batches, ranks)."""

    compute: Callable[[Tensor, PackedBatch], tuple[Tensor, Tensor]]
    width: int


@dataclass(frozen=True)
class Head:
    """What every op on a micro-batch's output needs to know: true vocabulary, temperature, the group that shares the
    columns, the kernels (`auto`, `triton` or `torch`).

    With `output_weight` [V/TP, H] the output is the hidden states, and the product with it is part of the op.
    """

    vocab: int
    temperature: float
    tensor_parallel_group: dist.ProcessGroup
    implementation: str = "auto"
    output_weight: Tensor | None = None
    sequence_parallel: bool = False

    def logprobs_and_entropy(self, output: Tensor, batch: PackedBatch) -> LogprobsAndEntropy:
        """log π(target) and entropy of the rows with a loss weight, 0 elsewhere."""
        if self.output_weight is None:
            return logprobs_and_entropy(output, batch.targets_T, row_mask=batch.loss_weights_T > 0, **self._shared())
        return linear_logprobs_and_entropy(
            output, self.output_weight, batch.targets_T, rows=batch.trained, sequence_parallel=self.sequence_parallel,
            **self._shared(),
        )  # fmt: skip

    def clipped_policy_loss(self, output: Tensor, batch: PackedBatch, **settings: float | str | None) -> PolicyLoss:
        """The clipped token-level policy loss of the micro-batch."""
        settings["reference_logprobs"] = batch.reference_logprobs_T
        rows = (batch.targets_T, batch.old_logprobs_T, batch.advantages_T, batch.loss_weights_T)
        if self.output_weight is None:
            return clipped_policy_loss(output, *rows, **settings, **self._shared())
        return linear_clipped_policy_loss(
            output, self.output_weight, *rows, rows=batch.trained, sequence_parallel=self.sequence_parallel, **settings,
            **self._shared(),
        )  # fmt: skip

    def _shared(self) -> dict[str, object]:
        return {
            "temperature": self.temperature,
            "vocab_size": self.vocab,
            "tensor_parallel_group": self.tensor_parallel_group,
            "implementation": self.implementation,
        }


def score_rows(head: Head, output: Tensor, batch: PackedBatch) -> Tensor:
    """fp32 [2, T]: log π(target) and entropy of each row with a loss weight, 0 elsewhere. No gradient."""
    with torch.no_grad():
        result = head.logprobs_and_entropy(output, batch)
        return torch.stack([result.logprobs.float(), result.entropy.float()])


def policy_loss(
    head: Head,
    *,
    denominator: float,
    eps_low: float,
    eps_high: float,
    eps_dual: float | None,
    entropy_coefficient: float,
    kl_coefficient: float = 0.0,
    kl_estimator: str = "k3",
) -> RowLoss:
    """The clipped token-level policy loss (`dapo_kernels.clipped_policy_loss`); sums are POLICY_SUMS.

    With a KL coefficient the batch carries the reference's log-probs; the sum "kl_loss" is that term's part of "loss".
    """

    def kl_part(result: PolicyLoss, batch: PackedBatch) -> Tensor:
        if not kl_coefficient:
            return torch.zeros((), device=result.loss.device)
        trained = batch.loss_weights_T > 0
        delta = torch.where(trained, result.logprobs - batch.reference_logprobs_T, 0.0)
        return kl_coefficient * (batch.loss_weights_T * kl_estimate(delta, kl_estimator)).sum() / denominator

    def loss(output: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        result = head.clipped_policy_loss(
            output,
            batch,
            eps_low=eps_low,
            eps_high=eps_high,
            eps_dual=eps_dual,
            denominator=denominator,
            entropy_coefficient=entropy_coefficient,
            kl_coefficient=kl_coefficient,
            kl_estimator=kl_estimator,
        )
        sums = (
            result.loss.detach(),
            result.clipped_low.sum(),
            result.clipped_high.sum(),
            result.clipped_dual.sum(),
            result.ratio.sum(),
            (batch.loss_weights_T > 0).sum(),
            kl_part(result, batch),
        )
        return result.loss, torch.stack([value.double() for value in sums])

    return RowLoss(loss, len(POLICY_SUMS))


def supervised_loss(head: Head, *, denominator: float) -> RowLoss:
    """−Σ w·log π(target) / denominator; sums are SUPERVISED_SUMS."""

    def loss(output: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        trained = batch.loss_weights_T > 0
        logprobs = head.logprobs_and_entropy(output, batch).logprobs
        value = -(batch.loss_weights_T * logprobs).sum() / denominator
        return value, torch.stack([value.detach().double(), trained.sum().double()])

    return RowLoss(loss, len(SUPERVISED_SUMS))


def value_rows(output_T1: Tensor, batch: PackedBatch) -> Tensor:
    """fp32 [1, T]: the value of each row with a loss weight, 0 elsewhere."""
    return torch.where(batch.loss_weights_T > 0, output_T1.squeeze(-1).float(), 0.0)[None]


def value_loss(*, denominator: float, clip: float | None) -> RowLoss:
    """The clipped value loss of PPO, over the rows with a loss weight; sums are VALUE_SUMS.

        Σ w · ½ max((V − R)², (V_old + clamp(V − V_old, −clip, clip) − R)²) / denominator

    `clip` None leaves (V − R)² alone. "clipped" counts the rows whose value has gone beyond the clip, away from R: they
    have no gradient.
    """

    def loss(output_T1: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        trained = batch.loss_weights_T > 0
        values = output_T1.squeeze(-1).float()
        error, clipped = (values - batch.returns_T).square(), torch.zeros_like(trained)
        if clip is not None:
            near = batch.old_values_T + (values - batch.old_values_T).clamp(-clip, clip)
            held = (near - batch.returns_T).square()
            clipped = trained & ((values - batch.old_values_T).abs() > clip) & (held > error)
            error = torch.where(clipped, held, error)
        value = 0.5 * torch.where(trained, batch.loss_weights_T * error, 0.0).sum() / denominator
        return value, torch.stack([value.detach().double(), clipped.sum().double(), trained.sum().double()])

    return RowLoss(loss, len(VALUE_SUMS))
