"""The coefficient of the entropy bonus, moved from step to step so that entropy stays near a target."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EntropyBonus:
    """Weights of the entropy bonus, per nat. applied: in the losses of this step; following: the coefficient that the
    next step begins with."""

    applied: float
    following: float


def adapted(coefficient: float, entropy: float, *, target: float, delta: float, most: float) -> EntropyBonus:
    """With the coefficient c of a step and the mean entropy e of its tokens before its first update:

        applied = c if e ≤ target, else 0
        following = min(most, max(0, c + delta if e < target else c − delta))

    Source: Skywork-OR1 (arXiv 2505.22312); the upper bound is ours. A c beyond `most` is cut to it first.
    """
    coefficient = min(coefficient, most)
    moved = coefficient + delta if entropy < target else coefficient - delta
    return EntropyBonus(coefficient if entropy <= target else 0.0, min(most, max(0.0, moved)))
