"""Pairs of responses to one prompt, one better than the other, and the loss of DPO (arXiv 2305.18290) on them.

    m = [S(y_w) − S_ref(y_w)] − [S(y_l) − S_ref(y_l)]         S: Σ_t log π of the response, in nats
    loss = −(1 − ε)·log σ(β·m) − ε·log σ(−β·m)                ε: label smoothing (conservative DPO, 2305.18290v3, A.3)

Its gradient is −slope·(∇S(y_w) − ∇S(y_l)) with slope = −∂loss/∂m: a policy gradient whose advantage is +slope on every
token of y_w and −slope on every token of y_l. So the two responses of a pair need not meet in one micro-batch.
"""

from collections.abc import Sequence

import numpy as np

Pair = tuple[int, int]  # (better, worse)

PAIRINGS = ("best-worst", "all")


def reward_pairs(rewards_G: np.ndarray, usable: Sequence[int], *, pairing: str, least_gap: float) -> list[Pair]:
    """Pairs among the `usable` responses of a group, whose rewards differ, and by at least `least_gap`.

    best-worst: one pair, the first of the highest reward with the first of the lowest. all: every such pair.

    Raises:
        ValueError: an unknown pairing.
    """
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing {pairing} is not one of {PAIRINGS}")

    def differ(better: int, worse: int) -> bool:
        gap = float(rewards_G[better]) - float(rewards_G[worse])
        return gap > 0 and gap >= least_gap

    if pairing == "all":
        return [(i, j) for i in usable for j in usable if differ(i, j)]
    if not usable:
        return []
    best = max(usable, key=lambda i: (float(rewards_G[i]), -i))
    worst = min(usable, key=lambda i: (float(rewards_G[i]), i))
    return [(best, worst)] if differ(best, worst) else []


def pair_losses(margins_P: np.ndarray, *, beta: float, label_smoothing: float) -> tuple[np.ndarray, np.ndarray]:
    """(losses, slopes) fp64 [P] of the margins m; slope = β·[(1 − ε)·σ(−β·m) − ε·σ(β·m)]."""
    logits = beta * np.asarray(margins_P, np.float64)
    agrees, differs = np.logaddexp(0, -logits), np.logaddexp(0, logits)  # −log σ(β·m), −log σ(−β·m)
    losses = (1 - label_smoothing) * agrees + label_smoothing * differs
    slopes = (1 - label_smoothing) * np.exp(-differs) - label_smoothing * np.exp(-agrees)
    return losses, beta * slopes
