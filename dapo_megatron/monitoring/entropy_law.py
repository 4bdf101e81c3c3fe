"""The entropy law: how reward is bought with entropy, and where that ends."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

SHARES = (0.2, 0.4)  # of the steps, from the first
LEAST_POINTS = 3


@dataclass(frozen=True)
class EntropyLaw:
    """R = −a·exp(H) + b, fitted on the first `points` points.

    ceiling: R at H = 0, b − a, where there is no entropy left to spend. rest_error: root mean square error on the
    points after those of the fit; NaN without any.
    """

    a: float
    b: float
    points: int
    rest_error: float

    @property
    def ceiling(self) -> float:
        return self.b - self.a

    def reward(self, entropy: ArrayLike) -> np.ndarray:
        """R that the law gives to entropies (nats)."""
        return self.b - self.a * np.exp(np.asarray(entropy, dtype=np.float64))


def fit_entropy_law(entropies: Sequence[float], rewards: Sequence[float], share: float) -> EntropyLaw | None:
    """Least squares of R = −a·exp(H) + b on the first `share` of a run ("The entropy mechanism", arXiv 2505.22617).

    Args:
        entropies: mean policy entropy of each step, nats a token, in step order.
        rewards: R of the same steps. Pairs that are not finite are left out.
        share: 0 … 1 of the pairs, rounded up.

    Returns:
        None with fewer than 3 points to fit, or entropies that do not vary among them.
    """
    pairs = [(h, r) for h, r in zip(entropies, rewards, strict=True) if math.isfinite(h) and math.isfinite(r)]
    points = math.ceil(share * len(pairs) - 1e-9)
    if points < LEAST_POINTS:
        return None
    entropy, reward = np.array(pairs, dtype=np.float64).T
    x = np.exp(entropy)
    known = x[:points] - x[:points].mean()
    if not np.abs(known).max() > 1e-9 * np.abs(x[:points]).max():
        return None
    slope = float(known @ reward[:points] / (known @ known))
    law = EntropyLaw(-slope, float(reward[:points].mean() - slope * x[:points].mean()), points, math.nan)
    rest = law.reward(entropy[points:]) - reward[points:]
    error = float(np.sqrt(np.mean(rest**2))) if rest.size else math.nan
    return EntropyLaw(law.a, law.b, points, error)
