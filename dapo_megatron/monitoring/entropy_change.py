"""What covariance foretells of entropy, beside what entropy then did."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from dapo_megatron.monitoring.metrics import finite_number


def entropy_change(history: Sequence[Mapping[str, Any]], metrics: Mapping[str, Any]) -> dict[str, float]:
    """`entropy/measured_change` and `entropy/predicted_change` of the updates between the last trained step and this
    one, nats a token; each is left out where it is not known.

    For softmax policies under policy gradient, to first order (arXiv 2505.22617, theorem 1):

        ΔH ≈ −η · Cov(log π, A)

    measured: H of this step's old policy − H of the last trained step's. predicted: −η · covariance/mean of the last
    trained step. η, how far an update moves log-probs for an advantage of 1, is no setting of an adaptive optimizer. It
    is taken as κ × learning rate, with κ the least-squares fit through the origin of all changes measured before, at
    least two of them. So each prediction is made from earlier steps alone.

    Entropies of two steps are of different prompts: single changes are noisy.
    """
    steps = [step for row in history if (step := _trained(row)) is not None]
    now = finite_number(metrics, "entropy/mean")
    if not steps or now is None:
        return {}
    entropy, force = steps[-1]
    found = {"entropy/measured_change": now - entropy}
    earlier = [(before[1], after[0] - before[0]) for before, after in pairwise(steps)]
    square = sum(force * force for force, _ in earlier)
    if len(earlier) >= 2 and square > 0:
        kappa = -sum(force * change for force, change in earlier) / square
        found["entropy/predicted_change"] = -kappa * force
    return found


def _trained(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """(entropy, covariance × learning rate) of a step that trained."""
    entropy, covariance = finite_number(row, "entropy/mean"), finite_number(row, "covariance/mean")
    if entropy is None or covariance is None:
        return None
    rate = finite_number(row, "learning_rate")
    return entropy, covariance * (1.0 if rate is None else rate)
