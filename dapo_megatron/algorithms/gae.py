"""Advantages a token from rewards and a critic's values: GAE(γ, λ) (arXiv 1506.02438), as PPO (1707.06347) uses it."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

BLOCK = 64
WHITEN_EPSILON = 1e-8


def token_rewards(reward: float, length: int, penalties_L: np.ndarray | None = None) -> np.ndarray:
    """Reward of each token of a response, fp64 [L]: all of it at the last token, less a penalty a token."""
    rewards = np.zeros(length) if penalties_L is None else -np.asarray(penalties_L, np.float64)
    rewards[-1:] += float(reward)
    return rewards


def generalized_advantages(
    rewards_L: np.ndarray, values_L: np.ndarray, *, gamma: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns of the tokens of one response.

        δ_t = r_t + γ V_{t+1} − V_t,   A_t = Σ_k (γλ)^k δ_{t+k},   R_t = A_t + V_t

    V_t is the value before token t is drawn. After the last token it is 0, for a truncated response too: its reward
    says what being cut short is worth.

    Returns:
        (advantages, returns) float32 [L], computed in float64.

    Raises:
        ValueError: not as many values as rewards.
    """
    rewards, values = np.asarray(rewards_L, np.float64), np.asarray(values_L, np.float64)
    if rewards.shape != values.shape or rewards.ndim != 1:
        raise ValueError(f"rewards {rewards.shape} and values {values.shape} must be one number a token each")
    following = np.append(values[1:], 0.0)[: len(values)]
    advantages = discounted_sums(rewards + gamma * following - values, gamma * lam)
    return advantages.astype(np.float32), (advantages + values).astype(np.float32)


def discounted_sums(terms_L: np.ndarray, factor: float) -> np.ndarray:
    """S_t = Σ_{k ≥ 0} factor^k · terms_{t+k}, float64 [L]. Blocks at a time: a step may hold 10^8 tokens."""
    length = len(terms_L)
    blocks = -(-length // BLOCK)
    padded = np.zeros(blocks * BLOCK)
    padded[:length] = terms_L
    places = np.arange(BLOCK)
    distance = places[:, None] - places
    sums = padded.reshape(blocks, BLOCK) @ np.where(distance >= 0, factor ** np.maximum(distance, 0.0), 0.0)
    behind, carried, whole = 0.0, np.zeros(blocks), factor**BLOCK
    for block in reversed(range(blocks)):
        carried[block] = behind
        behind = sums[block, 0] + whole * behind
    sums += carried[:, None] * factor ** (BLOCK - places.astype(np.float64))
    return sums.ravel()[:length]


def whiten(advantages: Sequence[np.ndarray], trained: Sequence[np.ndarray]) -> list[np.ndarray]:
    """(A − mean A) / (std A + 1e-8) of each sequence, mean and std (ddof 0) over the trained tokens of all of them.

    Args:
        advantages: float32 [L] each.
        trained: bool [L] each; the others' advantages are scaled alike, but say nothing.

    Returns:
        new float32 arrays; exactly 0 where all trained tokens have one advantage, the same arrays without any.
    """
    parts = [a[t] for a, t in zip(advantages, trained, strict=True)]
    count = sum(len(part) for part in parts)
    if count == 0:
        return list(advantages)
    mean = sum(float(part.sum(dtype=np.float64)) for part in parts) / count
    lowest, highest = _extremes(parts)
    if lowest == highest:  # compared, not subtracted: the std of equal floats may be a rounding error above 0
        return [np.zeros_like(a) for a in advantages]
    variance = sum(float(np.square(part.astype(np.float64) - mean).sum()) for part in parts) / count
    scale = variance**0.5 + WHITEN_EPSILON
    return [((a.astype(np.float64) - mean) / scale).astype(np.float32) for a in advantages]


def explained_variance(returns: Sequence[np.ndarray], values: Sequence[np.ndarray]) -> float:
    """1 − Var(R − V) / Var(R) over all tokens: 1 for perfect values, 0 for a constant; NaN where R is constant."""
    count = sum(map(len, returns))
    lowest, highest = _extremes(returns)
    if lowest == highest:
        return float("nan")

    def variance(parts: Callable[[], Iterator[np.ndarray]]) -> float:
        mean = sum(float(part.sum()) for part in parts()) / count
        return sum(float(np.square(part - mean).sum()) for part in parts()) / count

    errors = variance(lambda: (r.astype(np.float64) - v for r, v in zip(returns, values, strict=True)))
    return 1.0 - errors / variance(lambda: (r.astype(np.float64) for r in returns))


def _extremes(arrays: Sequence[np.ndarray]) -> tuple[float, float]:
    """Lowest and highest number of all; (0, 0) without any."""
    some = [array for array in arrays if len(array)]
    return min((float(a.min()) for a in some), default=0.0), max((float(a.max()) for a in some), default=0.0)
