"""The definitions written out in fp64 with torch.log_softmax and autograd, sharing no code with the kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor


def row_values(logits_NV: Tensor, targets_N: Tensor, temperature: float | Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """log softmax(z / T)[y] and the entropy of each row, over the first `vocab` columns."""
    scale = temperature[:, None].double() if isinstance(temperature, Tensor) and temperature.dim() else temperature
    logp = torch.log_softmax(logits_NV[:, :vocab] / scale, dim=1)
    return logp.gather(1, targets_N[:, None]).squeeze(1), -(logp.exp() * logp).sum(1)


@dataclass
class Expected:
    """What the clipped policy loss must give; `gradient_NV` is d loss / d logits, `c_N` is d loss / d l without the KL
    term, `kl_pull_N` bounds what an error of l, or a rounding, does to that term's part of it."""

    loss: Tensor
    logprobs: Tensor
    ratio: Tensor
    entropy: Tensor
    low: Tensor
    high: Tensor
    dual: Tensor
    gradient_NV: Tensor
    c_N: Tensor
    kl_pull_N: Tensor


def divergence(logprobs_N: Tensor, reference_N: Tensor, estimator: str) -> Tensor:
    """k2 or k3 of Δ = l − ref held to ±20, without gradient beyond."""
    delta = logprobs_N - reference_N
    delta = torch.where(delta.abs() <= 20, delta, 20.0 * delta.detach().sign())
    return delta**2 / 2 if estimator == "k2" else (-delta).exp() - 1 + delta


def clipped_loss(
    logits_NV: Tensor,
    targets_N: Tensor,
    old_N: Tensor,
    advantages_N: Tensor,
    weights_N: Tensor,
    *,
    eps_low: float,
    eps_high: float,
    eps_dual: float | None,
    denominator: float,
    temperature: float | Tensor = 1.0,
    entropy_coefficient: float = 0.0,
    vocab: int | None = None,
    reference_logprobs: Tensor | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: str = "k3",
) -> Expected:
    """Σ w (L − β_H H + β k) / denominator; where both arms of the max are equal the unclipped one is differentiated."""
    logits = logits_NV.detach().double().requires_grad_()
    logprobs, entropy = row_values(logits, targets_N, temperature, vocab or logits.shape[1])
    logprobs.retain_grad()
    log_ratio = logprobs - old_N.double()
    inside = log_ratio.abs() <= 20
    ratio = torch.where(inside, log_ratio, 20.0 * log_ratio.detach().sign()).exp()
    advantages, weights = advantages_N.double(), weights_N.double()
    unclipped, clipped = -ratio * advantages, -ratio.detach().clamp(1 - eps_low, 1 + eps_high) * advantages
    token_loss = torch.where(unclipped >= clipped, unclipped, clipped)
    dual = torch.zeros_like(inside)
    if eps_dual is not None:
        dual = (weights > 0) & (advantages < 0) & (ratio > eps_dual)
        token_loss = torch.where(dual, -eps_dual * advantages, token_loss)
    loss = (weights * (token_loss - entropy_coefficient * entropy)).sum() / denominator
    kl_pull = torch.zeros_like(weights)
    if kl_coefficient:
        kl = divergence(logprobs, reference_logprobs.double(), kl_estimator)
        loss = loss + (weights * kl_coefficient * kl).sum() / denominator
        far = (reference_logprobs.double() - logprobs.detach()).clamp(-20, 20)
        size = 1 + far.abs() if kl_estimator == "k2" else 1 + far.exp()
        kl_pull = weights * kl_coefficient / denominator * size
    policy_part = (weights * token_loss).sum() / denominator
    (c_N,) = torch.autograd.grad(policy_part, logprobs, retain_graph=True)
    loss.backward()
    trained = weights > 0
    return Expected(
        loss=loss.detach(),
        logprobs=torch.where(trained, logprobs.detach(), 0.0),
        ratio=torch.where(trained, ratio.detach(), 0.0),
        entropy=torch.where(trained, entropy.detach(), 0.0),
        low=trained & (advantages < 0) & (ratio < 1 - eps_low),
        high=trained & (advantages > 0) & (ratio > 1 + eps_high),
        dual=dual,
        gradient_NV=logits.grad,
        c_N=c_N,
        kl_pull_N=kl_pull,
    )
