"""Which tokens of a mini-batch keep their gradient, and which are singled out for a penalty.

Chosen on the host before the mini-batch's gradient pass, from log-probs, entropies and advantages of all its trained
tokens: no split into ranks or micro-batches shows. N is the number of trained tokens.

    high-entropy      the ⌊ratio·N⌋ tokens of highest entropy stay                       (arXiv 2506.01939)
    low-entropy       the ⌊ratio·N⌋ tokens of lowest entropy stay                        (the same, for study)
    low-probability   tokens with p < threshold stay                                     (SPO's mask, 2505.23564)
    clip-cov          ⌊cov_ratio·N⌋ tokens drawn from those with cov in (cov_low, cov_high) go    (2505.22617)

    cov_t = (A_t − mean A)·(log π_t − mean log π)        means over the trained tokens

Counts are at least 1 where there is a candidate. Equal values are taken in the order of sequences and tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dapo_megatron.algorithms.keyed_random import keyed_numbers

SELECTIONS = {
    "none": "every trained token keeps its gradient",
    "high-entropy": "the token_selection.ratio of tokens of highest entropy keep theirs (80/20 rule)",
    "low-entropy": "the token_selection.ratio of tokens of lowest entropy keep theirs (for study)",
    "low-probability": "tokens less probable than token_selection.threshold keep theirs (SPO's probability mask)",
    "clip-cov": "a random cov_ratio of tokens with covariance in (cov_low, cov_high) lose theirs (Clip-Cov)",
}
STATISTICS = {
    "old": "log-probs and entropies of the old-policy pass: free, and the same for every layout",
    "current": "of one more scoring pass before the update: the same for every layout",
    "micro_batch": "as current, but over each micro-batch alone, as other systems do: changes with the layout",
}


@dataclass(frozen=True)
class TokenValues:
    """The trained tokens of a mini-batch, or of a part of it, end to end, fp32 [N] where not said otherwise.

    samples_N, positions_N: integers ≥ 0, which response to which prompt, and the token's place in it.
    clipped_N: bool, the loss's clip leaves no gradient.
    """

    logprobs_N: np.ndarray
    entropies_N: np.ndarray
    advantages_N: np.ndarray
    clipped_N: np.ndarray
    samples_N: np.ndarray
    positions_N: np.ndarray

    def __len__(self) -> int:
        return len(self.logprobs_N)


@dataclass(frozen=True)
class SelectionSettings:
    """`algorithm.token_selection`, and the share of tokens that KL-Cov penalises (0: none)."""

    kind: str = "none"
    ratio: float = 0.2
    threshold: float = 0.9
    cov_ratio: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0
    penalised: float = 0.0


def kept_tokens(values: TokenValues, settings: SelectionSettings, key: tuple[int, int, int]) -> np.ndarray:
    """bool [N]: the tokens that keep their gradient. `key`: (run seed, step, update), of random draws.

    Raises:
        KeyError: an unknown kind.
    """
    return _KINDS[settings.kind](values, settings, key)


def penalised_tokens(values: TokenValues, share: float) -> np.ndarray:
    """bool [N]: the max(1, ⌊share·N⌋) tokens of highest covariance (KL-Cov, arXiv 2505.22617)."""
    return top_share(covariances(values), share)


def covariances(values: TokenValues) -> np.ndarray:
    """fp64 [N] as in the module's header."""
    advantages, logprobs = values.advantages_N.astype(np.float64), values.logprobs_N.astype(np.float64)
    if not len(values):
        return logprobs
    return (advantages - advantages.mean()) * (logprobs - logprobs.mean())


def choose(
    parts: Sequence[TokenValues], settings: SelectionSettings, key: tuple[int, int, int]
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(kept, penalised) bool [N] of each part, each part by itself; only kept tokens are penalised.

    The whole mini-batch is one part, but for `statistics: micro_batch`.
    """
    chosen = []
    for values in parts:
        kept_N = kept_tokens(values, settings, key)
        penalised_N = np.zeros(len(values), bool)
        if settings.penalised and kept_N.any():
            left = TokenValues(**{name: column[kept_N] for name, column in vars(values).items()})
            penalised_N[kept_N] = penalised_tokens(left, settings.penalised)
        chosen.append((kept_N, penalised_N))
    return chosen


def _clip_cov(values: TokenValues, settings: SelectionSettings, key: tuple[int, int, int]) -> np.ndarray:
    cov_N = covariances(values)
    candidates = np.flatnonzero((cov_N > settings.cov_low) & (cov_N < settings.cov_high) & ~values.clipped_N)
    drawn = keyed_numbers(key, values.samples_N[candidates], values.positions_N[candidates])
    count = min(_count(settings.cov_ratio, len(values)), len(candidates))
    kept_N = np.ones(len(values), bool)
    kept_N[candidates[np.argsort(drawn, kind="stable")[:count]]] = False
    return kept_N


_KINDS: dict[str, Callable[[TokenValues, SelectionSettings, tuple[int, int, int]], np.ndarray]] = {
    "none": lambda values, settings, key: np.ones(len(values), bool),
    "high-entropy": lambda values, settings, key: top_share(values.entropies_N, settings.ratio),
    "low-entropy": lambda values, settings, key: top_share(-values.entropies_N, settings.ratio),
    "low-probability": lambda values, settings, key: values.logprobs_N < np.log(np.float32(settings.threshold)),
    "clip-cov": _clip_cov,
}


def top_share(values_N: np.ndarray, share: float) -> np.ndarray:
    """bool [N], True on the max(1, ⌊share·N⌋) highest values, share in (0, 1]; of equal ones the first. N may be 0."""
    return _highest(values_N, _count(share, len(values_N)))


def _count(share: float, tokens: int) -> int:
    # 0.29 · 100 is 28.999999999999996
    return min(tokens, max(1, int(share * tokens * (1 + 1e-12))))


def _highest(values_N: np.ndarray, count: int) -> np.ndarray:
    """bool [N], True on exactly `count` of the highest values; of equal ones the first."""
    chosen = np.zeros(len(values_N), bool)
    if count == 0:
        return chosen
    least = np.partition(values_N, len(values_N) - count)[len(values_N) - count]
    np.greater(values_N, least, out=chosen)
    ties = np.flatnonzero(values_N == least)
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen
