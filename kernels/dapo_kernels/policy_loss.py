"""The clipped token-level policy loss on vocab-parallel logits.

    l_t  = log softmax(z_t / T)[y_t]
    r_t  = exp(clamp(l_t − old_t, −20, 20))                              gradient 0 where the clamp is active
    L_t  = max(−r·A, −clip(r, 1−ε_low, 1+ε_high)·A);   A < 0 and ε_dual set: L_t = min(L_t, −ε_dual·A)
    loss = Σ_t w_t·(L_t − β_H·H_t + β·k(l_t − ref_t)) / denominator      k: k2 or k3 of `kl`; without a reference β = 0

Sources: PPO (arXiv 1707.06347, eq. 7), DAPO (2503.14476, eq. 8: decoupled ε), dual clip (1912.09729, eq. 5), KL in the
loss (GRPO, 2402.03300, eq. 3).
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_kernels.arguments import (
    check_logits,
    check_loss_on_cpu,
    check_on_cpu,
    check_rows,
    check_vectors,
    choose_implementation,
    group_of_many,
    kernel_temperature,
    shard_of,
)
from dapo_kernels.device_errors import note_on_device
from dapo_kernels.kl import LOG_RATIO_LIMIT, check_kl, kl_estimate
from dapo_kernels.logprobs import logprobs_and_entropy

if TYPE_CHECKING:
    from dapo_kernels.triton_rows import ClipSettings


@dataclass(frozen=True)
class PolicyLoss:
    """`loss` is a differentiable scalar; everything else is detached, [N], and 0 / False on rows of weight 0."""

    loss: Tensor
    logprobs: Tensor
    ratio: Tensor
    entropy: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    clipped_dual: Tensor


class ClippedRows(NamedTuple):
    """Per row: w·(L − β_H·H + β·k)/denominator [N]; (l, ratio, H) [3, N]; (low, high, dual) bool [3, N]."""

    terms: Tensor
    values: Tensor
    clips: Tensor

    @classmethod
    def empty(cls, count: int, dtype: torch.dtype, device: torch.device) -> "ClippedRows":
        """Room for `count` rows."""
        terms, values = (torch.empty(*shape, count, dtype=dtype, device=device) for shape in ((), (3,)))
        return cls(terms, values, torch.empty(3, count, dtype=torch.bool, device=device))

    def part(self, rows: slice) -> "ClippedRows":
        """These rows' share of the same memory."""
        return ClippedRows(self.terms[rows], self.values[:, rows], self.clips[:, rows])


def clipped_policy_loss(
    logits: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    eps_low: float,
    eps_high: float,
    eps_dual: float | None = None,
    denominator: float | Tensor,
    temperature: float | Tensor = 1.0,
    entropy_coefficient: float = 0.0,
    reference_logprobs: Tensor | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: str = "k3",
    vocab_size: int | None = None,
    tensor_parallel_group: dist.ProcessGroup | None = None,
    in_place: bool = True,
    implementation: str = "auto",
) -> PolicyLoss:
    """The loss of the module's header; its gradient reaches this rank's columns of the logits alone.

    On the Triton path the gradient is written in the forward pass, with `in_place` over the logits, which are not to be
    used again, and backward runs once.

    Args:
        logits: [N, V/TP] bf16, fp16, fp32 or fp64, contiguous; with `in_place` its memory is reused for the gradient.
        targets: [N] int64 global ids.
        old_logprobs, advantages: [N] float.
        loss_mask: [N] float weights w ≥ 0; 0 = not trained. Aggregation and importance weights are folded into it.
        eps_low, eps_high: clip range [1 − ε_low, 1 + ε_high]; at an edge the unclipped gradient flows.
        eps_dual: the bound c > 1 itself, or None for no dual clip.
        denominator: weight sum of the whole global mini-batch, > 0.
        temperature: T > 0, a number or one a row.
        entropy_coefficient: β_H.
        reference_logprobs, kl_coefficient, kl_estimator: ref [N] float, β ≥ 0, "k2" or "k3"; looked at where β > 0.
        vocab_size, tensor_parallel_group, in_place, implementation: as in `logprobs_and_entropy`.

    Raises:
        ValueError: as `logprobs_and_entropy`; also a denominator ≤ 0, a negative weight, eps_low or eps_high < 0,
            eps_dual ≤ 1, kl_coefficient < 0, or > 0 without reference_logprobs or with k1.
    """
    check_logits(logits)
    check_rows(logits.shape[0], logits.device, targets, None)
    check_clip(eps_low, eps_high, eps_dual)
    check_kl(kl_coefficient, kl_estimator, reference_logprobs)
    reference = {"reference_logprobs": reference_logprobs} if kl_coefficient else {}
    check_vectors(
        logits.shape[0], logits.device, old_logprobs=old_logprobs, advantages=advantages, loss_mask=loss_mask,
        **reference,
    )  # fmt: skip
    check_loss_on_cpu(loss_mask, denominator)
    chosen = choose_implementation(implementation, logits.device, logits.dtype)
    if chosen == "torch":
        logprobs, entropy = logprobs_and_entropy(
            logits,
            targets,
            temperature=temperature,
            vocab_size=vocab_size,
            tensor_parallel_group=tensor_parallel_group,
            in_place=in_place,
            implementation="torch",
            row_mask=loss_mask > 0,
        )
        return loss_of_rows(
            logprobs, entropy, old_logprobs, advantages, loss_mask, eps_low=eps_low, eps_high=eps_high,
            eps_dual=eps_dual, denominator=denominator, entropy_coefficient=entropy_coefficient,
            kl_coefficient=kl_coefficient, kl_estimator=kl_estimator, **reference,
        )  # fmt: skip
    from dapo_kernels.triton_ops import TritonClippedLoss

    shard = shard_of(logits.shape[1], vocab_size, tensor_parallel_group)
    scale = kernel_temperature(temperature, logits.shape[0], logits)
    check_on_cpu(targets, temperature, shard.vocabulary, loss_mask > 0)
    loss, values, clips = TritonClippedLoss.apply(
        logits, targets.contiguous(), old_logprobs.detach(), advantages.detach(), loss_mask.detach().contiguous(),
        reference_logprobs, denominator, scale, shard, group_of_many(tensor_parallel_group),
        clip_settings(eps_low, eps_high, eps_dual, entropy_coefficient, kl_coefficient, kl_estimator),
        logits.requires_grad and torch.is_grad_enabled(), in_place,
    )  # fmt: skip
    return PolicyLoss(loss, *values, *clips)


def check_clip(eps_low: float, eps_high: float, eps_dual: float | None) -> None:
    """ValueError for clip bounds that are negative or NaN, or a dual bound that is not > 1."""
    for name, value in (("eps_low", eps_low), ("eps_high", eps_high)):
        if not value >= 0:
            raise ValueError(f"{name}={value} must be >= 0")
    if eps_dual is not None and not eps_dual > 1:
        raise ValueError(
            f"eps_dual={eps_dual} must be > 1: it is the bound on the ratio itself; use None to turn it off"
        )


def clip_settings(
    eps_low: float,
    eps_high: float,
    eps_dual: float | None,
    entropy_coefficient: float,
    kl_coefficient: float = 0.0,
    kl_estimator: str = "k3",
) -> "ClipSettings":
    """What the kernels compare with: 1 − ε_low, 1 + ε_high, ε_dual or inf; and the terms they add."""
    from dapo_kernels.triton_rows import ClipSettings

    dual = float("inf") if eps_dual is None else eps_dual
    return ClipSettings(1 - eps_low, 1 + eps_high, dual, entropy_coefficient, kl_coefficient, kl_estimator)


def loss_of_rows(
    logprobs: Tensor,
    entropy: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    eps_low: float,
    eps_high: float,
    eps_dual: float | None,
    denominator: float | Tensor,
    entropy_coefficient: float,
    reference_logprobs: Tensor | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: str = "k3",
) -> PolicyLoss:
    """The loss from l and H [N], differentiable in both: the part that never sees the vocabulary."""
    trained = loss_mask > 0
    # rows of weight 0 may carry anything, NaN included: they are cut out before any arithmetic
    old = torch.where(trained, old_logprobs.to(logprobs.dtype), 0.0)
    advantage = torch.where(trained, advantages.to(logprobs.dtype), 0.0)
    weight = torch.where(trained, loss_mask.to(logprobs.dtype), 0.0)

    ratio = (logprobs - old).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
    clipped_low = trained & (advantage < 0) & (ratio < 1 - eps_low)
    clipped_high = trained & (advantage > 0) & (ratio > 1 + eps_high)
    clipped_dual = torch.zeros_like(trained) if eps_dual is None else trained & (advantage < 0) & (ratio > eps_dual)
    effective_ratio = torch.where(clipped_low, 1 - eps_low, torch.where(clipped_high, 1 + eps_high, ratio))
    if eps_dual is not None:
        effective_ratio = torch.where(clipped_dual, eps_dual, effective_ratio)
    token_loss = -effective_ratio * advantage
    if entropy_coefficient:
        token_loss = token_loss - entropy_coefficient * entropy
    if kl_coefficient:
        reference = torch.where(trained, reference_logprobs.to(logprobs.dtype), 0.0)
        token_loss = token_loss + kl_coefficient * kl_estimate(logprobs - reference, kl_estimator)
    if isinstance(denominator, Tensor):
        denominator = denominator.reshape(())
    loss = (weight * token_loss).sum() / denominator
    if loss.device.type != "cpu":
        sound = (loss_mask >= 0).all()
        if isinstance(denominator, Tensor):  # a number has been looked at
            sound &= denominator.to(loss.device) > 0
        note_on_device(loss.device, "setting", ~sound)
        loss = torch.where(sound, loss, float("nan"))
    return PolicyLoss(
        loss=loss,
        logprobs=logprobs.detach(),
        ratio=torch.where(trained, ratio, 0.0).detach(),
        entropy=entropy.detach(),
        clipped_low=clipped_low,
        clipped_high=clipped_high,
        clipped_dual=clipped_dual,
    )
