"""Preference pairs of one mini-batch: from its groups, before its gradient pass, to advantages (`algorithm.dpo`).

The arithmetic is `algorithms/pairs.py`; here it is given its log-probs, and its outcome is folded into the batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dapo_megatron.algorithms.pairs import Pair, pair_losses, reward_pairs
from dapo_megatron.config.algorithm import Algorithm
from dapo_megatron.data.completions import PromptGroup
from dapo_megatron.data.records import SequenceBatch, repeated
from dapo_megatron.learner.learner import Learner
from dapo_megatron.token_choice import present_scores


@dataclass(frozen=True)
class PairSums:
    """Sums over pairs, in nats where not a count. `pairs`; `left_out`: groups that gave none.

    loss: as in `pair_losses`. better, worse: Σ_t log π of a response. better_gap, worse_gap: the same less the
    reference's; their difference is the margin. right: pairs with a margin above 0.
    """

    pairs: int
    left_out: int
    loss: float
    better: float
    worse: float
    better_gap: float
    worse_gap: float
    right: int


def pairs_of_groups(
    groups: Sequence[PromptGroup], first: int, batch: SequenceBatch, algorithm: Algorithm
) -> list[list[Pair]]:
    """Each group's pairs as sequence numbers of the batch; the first group's first response is sequence `first`.

    A response without a trained token (overlong filtering) is in no pair, nor are two of the same tokens.
    """
    found = []
    for group in groups:
        size = len(group.completions)
        usable = [i for i in range(size) if batch.loss_weights[first + i].any()]
        settings = algorithm.dpo
        pairs = reward_pairs(group.rewards, usable, pairing=settings.pairs, least_gap=settings.least_gap)
        tokens = [completion.tokens for completion in group.completions]
        found.append([(first + i, first + j) for i, j in pairs if not np.array_equal(tokens[i], tokens[j])])
        first += size
    return found


def weigh_pairs(
    learner: Learner,
    batch: SequenceBatch,
    sequences: Sequence[int],
    groups: Sequence[PromptGroup],
    algorithm: Algorithm,
) -> PairSums:
    """Leave in the mini-batch of `groups`, its `sequences`, the advantages that make −A·log π the gradient of DPO's
    loss, and weights 1 on paired responses, 0 elsewhere. The denominator is the number of pairs.

    Log-probs are the old policy's, or of one more scoring pass with `statistics: current`; collective then. The
    reference's are in the batch.
    """
    by_group = pairs_of_groups(groups, sequences[0], batch, algorithm)
    pairs = [pair for of_group in by_group for pair in of_group]
    if algorithm.statistics == "old":
        logprobs = {s: batch.old_logprobs[s] for s in sequences}
    else:
        logprobs = dict(zip(sequences, present_scores(learner, batch, sequences)[0], strict=True))
    sums = {s: float(logprobs[s].sum(dtype=np.float64)) for s in sequences}
    gaps = {s: sums[s] - float(batch.reference_logprobs[s].sum(dtype=np.float64)) for s in sequences}
    margins_P = np.array([gaps[better] - gaps[worse] for better, worse in pairs], np.float64)
    settings = algorithm.dpo
    losses_P, slopes_P = pair_losses(margins_P, beta=settings.beta, label_smoothing=settings.label_smoothing)
    advantages = dict.fromkeys(sequences, 0.0)
    for (better, worse), slope in zip(pairs, slopes_P.tolist(), strict=True):
        advantages[better] += slope
        advantages[worse] -= slope
    paired = {s for pair in pairs for s in pair}
    for s in sequences:
        tokens = len(batch.responses[s])
        batch.advantages[s] = repeated(advantages[s], tokens)
        batch.loss_weights[s] = repeated(float(s in paired), tokens)
    return PairSums(
        pairs=len(pairs),
        left_out=sum(not of_group for of_group in by_group),
        loss=float(losses_P.sum()),
        better=sum(sums[better] for better, _ in pairs),
        worse=sum(sums[worse] for _, worse in pairs),
        better_gap=sum(gaps[better] for better, _ in pairs),
        worse_gap=sum(gaps[worse] for _, worse in pairs),
        right=int((margins_P > 0).sum()),
    )


def total(parts: Sequence[PairSums]) -> PairSums:
    """The sums of all mini-batches together."""
    return PairSums(*(sum(column) for column in zip(*(vars(part).values() for part in parts), strict=True)))
