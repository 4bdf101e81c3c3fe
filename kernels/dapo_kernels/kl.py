"""Estimators of the divergence KL(π‖π_ref) from tokens that π drew, one number a token.

    Δ = clamp(log π − log π_ref, −20, 20)           gradient 0 where the clamp is active
    k1 = Δ            unbiased; as a loss its expected gradient is 0
    k2 = Δ²/2         its gradient is that of the divergence
    k3 = e^(−Δ) − 1 + Δ    unbiased and ≥ 0

Sources: J. Schulman, "Approximating KL divergence" (2020); k3 in the loss: GRPO (arXiv 2402.03300, eq. 4).
"""

from typing import Literal

from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]
LOG_RATIO_LIMIT = 20.0


def kl_estimate(log_ratio: Tensor, estimator: KLEstimator) -> Tensor:
    """k1, k2 or k3 of log π − log π_ref, in nats: same shape and dtype, differentiable.

    Raises:
        ValueError: an unknown estimator.
    """
    delta = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    if estimator == "k1":
        return delta
    if estimator == "k2":
        return delta.square() / 2
    if estimator == "k3":
        return (-delta).expm1() + delta
    raise ValueError(f"estimator={estimator!r} is not known; use 'k1', 'k2' or 'k3'")


def check_kl(coefficient: float, estimator: str, reference_logprobs: Tensor | None) -> None:
    """ValueError for a term that the loss cannot have: no reference, a negative or NaN coefficient, k1."""
    if not 0 <= coefficient < float("inf"):
        raise ValueError(f"kl_coefficient={coefficient} must be >= 0 and finite")
    if coefficient == 0:
        return
    if estimator not in ("k2", "k3"):
        raise ValueError(
            f"kl_estimator={estimator!r} cannot be a loss: use 'k2' or 'k3' (the expected gradient of k1 is 0)"
        )
    if reference_logprobs is None:
        raise ValueError(f"kl_coefficient={coefficient} needs reference_logprobs")
