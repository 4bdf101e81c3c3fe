"""Token selection and penalties of one mini-batch: from a batch, before its gradient pass, to weights that are changed.

The choice itself is arithmetic on arrays (`algorithms/token_selection.py`); here it is given its statistics, and its
outcome is folded into the batch.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dapo_megatron.algorithms.mini_batch import aggregate
from dapo_megatron.algorithms.registry import TokenValues
from dapo_megatron.algorithms.token_selection import choose
from dapo_megatron.config.algorithm import Algorithm
from dapo_megatron.data.records import SequenceBatch, repeated
from dapo_megatron.learner.learner import Learner
from dapo_megatron.methods import selection_settings

Scores = tuple[list[np.ndarray], list[np.ndarray]]  # log-probs and entropies, fp32 [L] a sequence


@dataclass(frozen=True)
class TokenChoice:
    """Of a mini-batch: bool [L] a sequence, in its order; how many tokens were trained, kept, penalised; seconds."""

    kept: list[np.ndarray]
    penalised: list[np.ndarray]
    trained: int
    seconds: float

    @property
    def kept_tokens(self) -> int:
        return sum(int(flags.sum()) for flags in self.kept)

    @property
    def penalised_tokens(self) -> int:
        return sum(int(flags.sum()) for flags in self.penalised)


def chooses_tokens(algorithm: Algorithm) -> bool:
    """Whether the recipe looks at a mini-batch's tokens before their gradient."""
    return algorithm.token_selection.kind != "none" or algorithm.policy_loss == "kl-cov"


def choose_tokens(
    learner: Learner,
    batch: SequenceBatch,
    sequences: Sequence[int],
    samples: Sequence[int],
    old_entropies: Sequence[np.ndarray],
    algorithm: Algorithm,
    key: tuple[int, int, int],
) -> TokenChoice:
    """The choice for the mini-batch of `sequences`; the same on every rank, collective where a scoring pass is needed.

    Args:
        samples: a number ≥ 0 of every sequence of the batch that says which response to which prompt it is.
        old_entropies: fp32 [L] of every sequence of the batch, of the policy whose log-probs are the old ones.
        key: (run seed, step, update).
    """
    started = time.perf_counter()
    if algorithm.statistics == "old":
        logprobs, entropies = ([column[s] for s in sequences] for column in (batch.old_logprobs, old_entropies))
    else:
        logprobs, entropies = present_scores(learner, batch, sequences)
    parts = [list(range(len(sequences)))]
    if algorithm.statistics == "micro_batch":
        place = {s: i for i, s in enumerate(sequences)}
        parts = [[place[s] for s in m] for rank in learner.packing(batch, sequences) for m in rank if m]
    trained = [batch.loss_weights[s] > 0 for s in sequences]
    values = [_values(batch, sequences, samples, part, (logprobs, entropies), trained, algorithm) for part in parts]
    kept, penalised = ([np.zeros(len(flags), bool) for flags in trained] for _ in range(2))
    for part, chosen in zip(parts, choose(values, selection_settings(algorithm), key), strict=True):
        ends = np.cumsum([np.count_nonzero(trained[i]) for i in part])[:-1]
        for flags, of_part in zip((kept, penalised), chosen, strict=True):
            for i, of_sequence in zip(part, np.split(of_part, ends), strict=True):
                flags[i][trained[i]] = of_sequence
    return TokenChoice(kept, penalised, sum(map(len, values)), time.perf_counter() - started)


def weigh(
    batch: SequenceBatch,
    sequences: Sequence[int],
    choice: TokenChoice | None,
    algorithm: Algorithm,
    *,
    constant_length: int,
) -> float:
    """Fold choice and aggregation into the weights and penalties of a mini-batch, once; returns its denominator.

    0 where no token is left to train on. Tokens that lose their gradient leave the denominator too, but for
    `denominator: all`, for Clip-Cov, and for `loss_aggregation: constant-length`, whose denominator counts responses.
    """
    divide_by_all = algorithm.token_selection.kind == "clip-cov" or algorithm.token_selection.denominator == "all"
    if choice is not None and not divide_by_all:
        _drop(batch, sequences, choice)
    denominator = aggregate(batch, sequences, algorithm.loss_aggregation, constant_length=constant_length)
    if choice is None:
        return denominator
    if divide_by_all:
        _drop(batch, sequences, choice)
    if algorithm.policy_loss == "kl-cov":
        if batch.penalties is None:
            batch.penalties = [repeated(0.0, len(response)) for response in batch.responses]
        for s, flags in zip(sequences, choice.penalised, strict=True):
            batch.penalties[s] = flags * np.float32(algorithm.kl_cov.beta)
    return denominator if choice.kept_tokens else 0.0


def _drop(batch: SequenceBatch, sequences: Sequence[int], choice: TokenChoice) -> None:
    for s, kept in zip(sequences, choice.kept, strict=True):
        batch.loss_weights[s] = batch.loss_weights[s] * kept


def present_scores(learner: Learner, batch: SequenceBatch, sequences: Sequence[int]) -> Scores:
    """Log-probs and entropies of the mini-batch's response tokens under the policy as it is; collective."""
    columns = ("prompts", "responses", "loss_weights", "advantages", "old_logprobs")
    part = {name: [getattr(batch, name)[s] for s in sequences] for name in columns}
    return learner.score(replace(batch, **part, reference_logprobs=None, penalties=None))


def _values(
    batch: SequenceBatch,
    sequences: Sequence[int],
    samples: Sequence[int],
    part: Sequence[int],
    scores: Scores,
    trained: Sequence[np.ndarray],
    algorithm: Algorithm,
) -> TokenValues:
    """The trained tokens of a part, given by places in `sequences`."""

    def column(arrays: Sequence[np.ndarray], dtype: type = np.float32) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(a[trained[i]] for i, a in zip(part, arrays, strict=True))])

    chosen = [sequences[i] for i in part]
    logprobs_N = column([scores[0][i] for i in part])
    advantages_N = column([batch.advantages[s] for s in chosen])
    clipped_N = np.zeros(len(logprobs_N), bool)
    if algorithm.policy_loss == "clip" and algorithm.statistics != "old":
        ratio_N = np.exp(np.clip(logprobs_N - column([batch.old_logprobs[s] for s in chosen]), -20, 20))
        clipped_N = (advantages_N > 0) & (ratio_N > 1 + algorithm.eps_high)
        clipped_N |= (advantages_N < 0) & (ratio_N < 1 - algorithm.eps_low)
    return TokenValues(
        logprobs_N=logprobs_N,
        entropies_N=column([scores[1][i] for i in part]),
        advantages_N=advantages_N,
        clipped_N=clipped_N,
        samples_N=column([np.full(len(trained[i]), samples[sequences[i]]) for i in part], np.int64),
        positions_N=column([np.arange(len(trained[i]), dtype=np.int32) for i in part], np.int32),
    )
