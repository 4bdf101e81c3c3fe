"""What leaving the reference policy costs (`algorithm.kl`), and how far the policy has gone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from dapo_kernels import kl_estimate

from dapo_megatron.config.algorithm import KL
from dapo_megatron.data.completions import PromptGroup


def charges_rewards(kl: KL) -> bool:
    """Whether the divergence is taken from rewards."""
    return kl.coefficient > 0 and kl.place == "reward"


def reward_penalties(groups: Sequence[PromptGroup], kl: KL) -> list[np.ndarray]:
    """coefficient · Σ_t k(log π_old − log π_ref) of each response, fp64 [G] a group, where `kl.place` is "reward";
    else nothing.

    π_old is the policy that drew the response. The sum is over all its tokens, those of a response that overlong
    filtering takes out of the loss too, since its reward counts in the group's mean.
    """
    if not charges_rewards(kl):
        return []
    return [np.array([float(charge.sum()) for charge in token_penalties([group], kl)]) for group in groups]


def token_penalties(groups: Sequence[PromptGroup], kl: KL) -> list[np.ndarray]:
    """coefficient · k(log π_old − log π_ref) of each token, fp64 [L] a response, group after group, where `kl.place`
    is "reward"; else nothing."""
    if not charges_rewards(kl):
        return []
    return [
        kl.coefficient * kl_estimate(torch.from_numpy(old - reference).double(), kl.estimator).numpy()
        for group in groups
        for old, reference in zip(group.old_logprobs, group.reference_logprobs, strict=True)
    ]


@dataclass(frozen=True)
class Divergence:
    """How far the policy that drew the trained tokens is from the reference, in nats a token: `mean` by k3, `chosen`
    by the recipe's `estimator`. `loss`: what the KL term adds to the loss; `penalty`: what it takes from a response's
    reward; means over updates and over responses."""

    mean: float
    estimator: str
    chosen: float
    loss: float
    penalty: float


def divergence(log_ratios: Iterable[np.ndarray], kl: KL, *, loss: float, penalties: Sequence[np.ndarray]) -> Divergence:
    """From log π_old − log π_ref of each sequence's trained tokens (at least one in all), fp32 [n]."""
    mean, chosen, tokens = 0.0, 0.0, 0
    for log_ratio in log_ratios:
        delta = torch.from_numpy(log_ratio).double()
        mean += float(kl_estimate(delta, "k3").sum())
        chosen += float(kl_estimate(delta, kl.estimator).sum())
        tokens += len(delta)
    return Divergence(
        mean=mean / tokens,
        estimator=kl.estimator,
        chosen=chosen / tokens,
        loss=loss,
        penalty=float(np.concatenate(penalties).mean()) if penalties else 0.0,
    )
