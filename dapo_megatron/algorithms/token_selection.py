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

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dapo_megatron.algorithms.keyed_random import keyed_numbers
from dapo_megatron.algorithms.registry import (
    SelectionSettings,
    TokenValues,
    raised,
    register_token_selection,
    token_selections,
)
from dapo_megatron.errors import RunError

STATISTICS = {
    "old": "log-probs and entropies of the old-policy pass: free, and the same for every layout",
    "current": "of one more scoring pass before the update: the same for every layout",
    "micro_batch": "as current, but over each micro-batch alone, as other systems do: changes with the layout",
}


def kept_tokens(values: TokenValues, settings: SelectionSettings, key: tuple[int, int, int]) -> np.ndarray:
    """bool [N]: the tokens that keep their gradient. `key`: (run seed, step, update), of random draws.

    Raises:
        KeyError: an unknown kind.
        RunError: a registered selection raised, or did not return one bool a token.
    """
    method = token_selections()[settings.kind]
    if not len(values):
        return np.zeros(0, bool)  # a method need not expect it
    told = f"algorithm.token_selection.kind={method.name}"
    try:
        kept_N = np.asarray(method.compute(replace(values, key=key), settings))
    except RunError:
        raise
    except Exception as error:
        raise RunError(f"{told} raised {raised(error)}") from error
    if kept_N.dtype != bool or kept_N.shape != values.logprobs_N.shape:
        raise RunError(
            f"{told} returned {kept_N.dtype} {list(kept_N.shape)} for {len(values)} tokens; it must return one bool a "
            "token, True for those that keep their gradient"
        )
    return kept_N


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
            penalised_N[kept_N] = penalised_tokens(values.only(kept_N), settings.penalised)
        chosen.append((kept_N, penalised_N))
    return chosen


@register_token_selection("none", "every trained token keeps its gradient")
def every_token(values: TokenValues, settings: SelectionSettings) -> np.ndarray:
    """All True."""
    return np.ones(len(values), bool)


@register_token_selection(
    "high-entropy", "the token_selection.ratio of tokens of highest entropy keep theirs (80/20 rule)"
)
def high_entropy(values: TokenValues, settings: SelectionSettings) -> np.ndarray:
    """arXiv 2506.01939."""
    return top_share(values.entropies_N, settings.ratio)


@register_token_selection(
    "low-entropy", "the token_selection.ratio of tokens of lowest entropy keep theirs (for study)"
)
def low_entropy(values: TokenValues, settings: SelectionSettings) -> np.ndarray:
    """The other end."""
    return top_share(-values.entropies_N, settings.ratio)


@register_token_selection(
    "low-probability", "tokens less probable than token_selection.threshold keep theirs (SPO's probability mask)"
)
def low_probability(values: TokenValues, settings: SelectionSettings) -> np.ndarray:
    """arXiv 2505.23564."""
    return values.logprobs_N < np.log(np.float32(settings.threshold))


@register_token_selection(
    "clip-cov", "a random cov_ratio of tokens with covariance in (cov_low, cov_high) lose theirs (Clip-Cov)"
)
def clip_cov(values: TokenValues, settings: SelectionSettings) -> np.ndarray:
    """arXiv 2505.22617."""
    cov_N = covariances(values)
    candidates = np.flatnonzero((cov_N > settings.cov_low) & (cov_N < settings.cov_high) & ~values.clipped_N)
    drawn = keyed_numbers(values.key, values.samples_N[candidates], values.positions_N[candidates])
    count = min(_count(settings.cov_ratio, len(values)), len(candidates))
    kept_N = np.ones(len(values), bool)
    kept_N[candidates[np.argsort(drawn, kind="stable")[:count]]] = False
    return kept_N


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
