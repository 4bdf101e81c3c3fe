"""Statistics of a step's trained tokens that say where the policy is heading."""

import torch
from torch import Tensor

TOP_SHARE = 0.002
SAMPLED = 1_000_000  # values looked at to guess where the top begins


def covariance(advantages_T: Tensor, logprobs_T: Tensor) -> tuple[float, float]:
    """Mean, and mean of the top 0.2 % (at least one token), of

        cov_t = (A_t − mean A) · (log π_t − mean log π)

    over trained tokens, log π of the policy that drew them ("The entropy mechanism", arXiv 2505.22617). The mean is
    what entropy falls with, and a few tokens far above it carry most of it.

    Args:
        advantages_T, logprobs_T: fp32 [T]. Sums are taken in fp64.

    Returns:
        (nats × advantage, the same); (0, 0) without tokens.
    """
    if advantages_T.numel() == 0:
        return 0.0, 0.0
    centred = [values - values.mean(dtype=torch.float64).float() for values in (advantages_T, logprobs_T)]
    product_T = centred[0].mul_(centred[1])
    return float(product_T.mean(dtype=torch.float64)), _top_mean(product_T, max(1, int(TOP_SHARE * product_T.numel())))


def _top_mean(values_T: Tensor, count: int) -> float:
    """Mean of the `count` largest values. Sorting 10^8 values would cost gigabytes, so most are left out beforehand."""
    stride = max(1, values_T.numel() // SAMPLED)
    sample = values_T[::stride]
    # below what is surely outside the top: a place three times as deep in the sample
    depth = min(sample.numel(), 3 * count // stride + 10)
    candidates = values_T[values_T >= sample.topk(depth).values[-1]]
    if candidates.numel() < count:
        candidates = values_T
    return float(candidates.topk(count).values.mean(dtype=torch.float64))
