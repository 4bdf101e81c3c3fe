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

from dapo_megatron.algorithms.registry import LossMethod, TokenBatch, TokenLosses, raised
from dapo_megatron.data.packing import PackedBatch
from dapo_megatron.errors import RunError
from dapo_megatron.learner.reductions import sum_over_context

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


def token_policy_loss(
    head: Head,
    method: LossMethod,
    *,
    denominator: float,
    entropy_coefficient: float = 0.0,
    kl_coefficient: float = 0.0,
    kl_estimator: str = "k3",
    **settings: float | bool | None,
) -> RowLoss:
    """Σ w·(L − β_H·H + β·k) / denominator, L a token from a registered policy loss; sums are POLICY_SUMS.

    One fused pass gives log-probs and entropies with their gradients; the rest is arithmetic on trained tokens.
    `settings`: those of the recipe that `TokenBatch` has.

    Raises (when computed):
        RunError: the method raised, or did not return a differentiable loss a token.
    """

    def loss(output: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        tokens = _trained_tokens(head, output, batch, settings)
        found = _losses_of(method, tokens, anywhere=batch.trained_rows > 0)
        losses_N = found.losses_N
        if entropy_coefficient:
            losses_N = losses_N - entropy_coefficient * tokens.entropy_N
        kl_loss = torch.zeros((), device=output.device)
        if kl_coefficient:
            delta_N = tokens.logprobs_N - batch.reference_logprobs_T[batch.trained]
            kl_N = kl_coefficient * kl_estimate(delta_N, kl_estimator)
            kl_loss = (tokens.loss_weights_N * kl_N).sum().detach() / denominator
            losses_N = losses_N + kl_N
        value = (tokens.loss_weights_N * losses_N).sum() / denominator
        ratio_N = tokens.log_ratio().exp().detach() if found.ratio_N is None else found.ratio_N
        clips = (found.clipped_low_N, found.clipped_high_N, found.clipped_dual_N)
        counts = (torch.zeros((), device=output.device) if flags_N is None else flags_N.sum() for flags_N in clips)
        tokens_trained = torch.tensor(batch.trained.numel(), device=output.device)
        sums = (value.detach(), *counts, ratio_N.sum(), tokens_trained, kl_loss)
        return value, torch.stack([number.double() for number in sums])

    return RowLoss(loss, len(POLICY_SUMS))


def _trained_tokens(
    head: Head, output: Tensor, batch: PackedBatch, settings: dict[str, float | bool | None]
) -> TokenBatch:
    logprobs_T, entropy_T = head.logprobs_and_entropy(output, batch)
    rows = batch.trained
    old_N = batch.old_logprobs_T[rows]
    return TokenBatch(
        logprobs_N=logprobs_T[rows],
        entropy_N=entropy_T[rows],
        old_logprobs_N=old_N,
        advantages_N=batch.advantages_T[rows],
        penalties_N=torch.zeros_like(old_N) if batch.penalties_T is None else batch.penalties_T[rows],
        loss_weights_N=batch.loss_weights_T[rows],
        sequences_N=batch.sequences_N,
        sequences=batch.cu_seqlens.numel() - 1,
        sum_over_ranks=sum_over_context if batch.context > 1 else None,
        **settings,
    )


def _losses_of(method: LossMethod, tokens: TokenBatch, *, anywhere: bool) -> TokenLosses:
    """`anywhere`: whether this or another context-parallel rank has trained tokens; all must ask alike."""
    if not anywhere:  # padding alone; a method need not expect it
        return TokenLosses(tokens.logprobs_N)
    told = f"algorithm.policy_loss={method.name}"
    try:
        found = method.compute(tokens)
    except RunError:
        raise
    except Exception as error:
        raise RunError(f"{told} raised {raised(error)}") from error
    found = found if isinstance(found, TokenLosses) else TokenLosses(found)
    losses_N, shape = found.losses_N, tokens.logprobs_N.shape
    if not isinstance(losses_N, Tensor) or losses_N.shape != shape:
        what = f"a tensor {list(losses_N.shape)}" if isinstance(losses_N, Tensor) else repr(losses_N)
        raise RunError(f"{told} returned {what}; it must return TokenLosses or a loss a token, {list(shape)}")
    if not losses_N.requires_grad:
        raise RunError(f"{told} returned losses without a gradient; compute them from logprobs_N or entropy_N")
    return found


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
