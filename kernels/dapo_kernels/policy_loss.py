"""The clipped token-level policy loss on vocab-parallel logits.

    l_t  = log softmax(z_t / T)[y_t]
    r_t  = exp(clamp(l_t − old_t, −20, 20))                              gradient 0 where the clamp is active
    L_t  = max(−r·A, −clip(r, 1−ε_low, 1+ε_high)·A);   A < 0 and ε_dual set: L_t = min(L_t, −ε_dual·A)
    loss = Σ_t w_t·(L_t − β_H·H_t) / denominator

Sources: PPO (arXiv 1707.06347, eq. 7), DAPO (2503.14476, eq. 8: decoupled ε), dual clip (1912.09729, eq. 5).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_kernels.logprobs import logprobs_and_entropy

LOG_RATIO_LIMIT = 20.0


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
    vocab_size: int | None = None,
    tensor_parallel_group: dist.ProcessGroup | None = None,
    in_place: bool = True,
    implementation: str = "auto",
) -> PolicyLoss:
    """The loss of the module's header; its gradient reaches this rank's columns of the logits alone.

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
        vocab_size, tensor_parallel_group, in_place, implementation: as in `logprobs_and_entropy`.

    Raises:
        ValueError: as `logprobs_and_entropy`; also a denominator ≤ 0, a negative weight, eps_dual ≤ 1.
    """
    for name, value in (("old_logprobs", old_logprobs), ("advantages", advantages), ("loss_mask", loss_mask)):
        if value.shape != targets.shape or not value.is_floating_point():
            raise ValueError(f"{name} must be float {tuple(targets.shape)}; got {value.dtype} {tuple(value.shape)}")
    if eps_dual is not None and not eps_dual > 1:
        raise ValueError(
            f"eps_dual={eps_dual} must be > 1: it is the bound on the ratio itself; use None to turn it off"
        )
    on_cpu = logits.device.type == "cpu"
    if (on_cpu or not isinstance(denominator, Tensor)) and not float(denominator) > 0:
        raise ValueError(f"denominator={float(denominator)} must be > 0: the weight sum of the whole mini-batch")
    if on_cpu and loss_mask.numel() and not float(loss_mask.min()) >= 0:  # a NaN as well
        raise ValueError(f"loss_mask holds {float(loss_mask.min())}; weights must be >= 0")

    trained = loss_mask > 0
    logprobs, entropy = logprobs_and_entropy(
        logits,
        targets,
        temperature=temperature,
        vocab_size=vocab_size,
        tensor_parallel_group=tensor_parallel_group,
        in_place=in_place,
        implementation=implementation,
        row_mask=trained,
    )
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
    loss = (weight * token_loss).sum() / denominator
    return PolicyLoss(
        loss=loss,
        logprobs=logprobs.detach(),
        ratio=torch.where(trained, ratio, 0.0).detach(),
        entropy=entropy.detach(),
        clipped_low=clipped_low,
        clipped_high=clipped_high,
        clipped_dual=clipped_dual,
    )
