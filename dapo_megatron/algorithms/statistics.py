"""Statistics of a step's trained tokens that say where the policy is heading.

A step may hold 10^8 tokens: sequence after sequence is looked at, and nothing of the step's size is made.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dapo_megatron.data.completions import NOT_DRAWN, PromptGroup
from dapo_megatron.data.records import SequenceBatch

TOP_SHARE = 0.002
SAMPLED = 1_000_000  # values looked at to guess where the top begins

Part = tuple[np.ndarray, np.ndarray]  # advantages and log-probs of some tokens, fp32 [n] each


@dataclass(frozen=True)
class TokenStatistics:
    """Means over the trained tokens, of the policy that drew them as the learner computes it.

    entropy: nats. probability: of the drawn token. log_ratio, log_ratio_abs, log_ratio_abs_max: log π_old − log π of
    the engine, nats. covariance, covariance_top: as `covariance`.
    """

    tokens: int
    entropy: float
    probability: float
    log_ratio: float
    log_ratio_abs: float
    log_ratio_abs_max: float
    covariance: float
    covariance_top: float


def token_statistics(batch: SequenceBatch, groups: Sequence[PromptGroup]) -> TokenStatistics | None:
    """Statistics of a batch of `groups`, which carry old log-probs and entropies; None where no token is trained."""
    sums = np.zeros(4)
    largest = 0.0
    parts: list[Part] = []
    # a response of a file has no engine to differ from
    engines = [
        old if len(c.tokens) and c.policy_versions[0] == NOT_DRAWN else c.logprobs
        for c, old in zip((c for g in groups for c in g.completions), batch.old_logprobs, strict=True)
    ]
    entropies_of = [values for g in groups for values in g.entropies]
    columns = (batch.loss_weights, batch.advantages, batch.old_logprobs, engines, entropies_of)
    for weights, *values in zip(*columns, strict=True):
        trained = weights > 0
        if not trained.any():
            continue
        if not trained.all():
            values = [value[trained] for value in values]
        advantages, logprobs, engine, entropies = values
        gap = logprobs - engine
        distance = np.abs(gap)
        # numpy adds pairwise: within a sequence fp32 is enough
        sums += (entropies.sum(), np.exp(logprobs).sum(), gap.sum(), distance.sum())
        largest = np.maximum(largest, distance.max())  # a NaN stays one
        parts.append((advantages, logprobs))
    if not parts:
        return None
    tokens = sum(len(advantages) for advantages, _ in parts)
    entropy, probability, log_ratio, log_ratio_abs = (sums / tokens).tolist()
    return TokenStatistics(tokens, entropy, probability, log_ratio, log_ratio_abs, float(largest), *covariance(parts))


def covariance(parts: Sequence[Part]) -> tuple[float, float]:
    """Mean, and mean of the top 0.2 % (at least one token), of

        cov_t = (A_t − mean A) · (log π_t − mean log π)

    over all tokens of all parts, log π of the policy that drew them ("The entropy mechanism", arXiv 2505.22617). The
    mean is what entropy falls with, and a few tokens far above it carry most of it.

    Returns:
        (nats × advantage, the same), in fp64 over the parts; (0, 0) without tokens.
    """
    tokens = sum(len(advantages) for advantages, _ in parts)
    if tokens == 0:
        return 0.0, 0.0
    means = [sum(float(part[k].sum()) for part in parts) / tokens for k in (0, 1)]

    def products(part: Part) -> np.ndarray:
        return (part[0] - np.float32(means[0])) * (part[1] - np.float32(means[1]))

    count = max(1, int(TOP_SHARE * tokens))
    # sorting 10^8 values would cost gigabytes: below what is surely outside the top nothing is kept
    stride = max(1, tokens // SAMPLED)
    sample = np.concatenate([products((a[::stride], p[::stride])) for a, p in parts])
    depth = min(len(sample), 3 * count // stride + 10)  # three times as deep in the sample as the top may reach
    least = np.partition(sample, -depth)[-depth]
    total, candidates = 0.0, []
    for part in parts:
        values = products(part)
        total += float(values.sum())
        candidates.append(values[values >= least])
    top = np.concatenate(candidates)
    if len(top) < count:  # the sample misled, or a NaN is among them
        top = np.concatenate([products(part) for part in parts])
    return float(total / tokens), float(np.partition(top, -count)[-count:].mean(dtype=np.float64))
