"""Scored groups → a batch to learn from: advantages, loss weights, and the mini-batches of one rollout step."""

from collections.abc import Sequence

import numpy as np
import torch

from dapo_megatron.algorithms.advantage_rules import advantages_of
from dapo_megatron.algorithms.registry import GroupRewards
from dapo_megatron.data.completions import PromptGroup
from dapo_megatron.data.records import SequenceBatch, repeated, sequence_batch

LOG_RATIO_LIMIT = 20.0  # as in the loss


def batch_of_groups(
    groups: Sequence[PromptGroup],
    *,
    overlong_filtering: bool,
    advantage_epsilon: float,
    advantage: str = "group",
    penalties: Sequence[np.ndarray] = (),
    estimates: Sequence[np.ndarray] | None = None,
) -> SequenceBatch:
    """All completions of the groups, group after group: A_i on every response token, weight 1, or 0 for a truncated
    response. `advantage`: the name of a registered rule. `penalties`: [G] of each group, taken from its
    rewards here and nowhere else. `estimates`: advantages fp32 [L] of each completion instead, from a critic.

    Old log-probs are the groups' own where they carry them (all or none do), else 0; those of the reference are there
    if all groups carry them.
    A truncated response that is filtered leaves the loss and its denominator, yet counts in its group's mean and std.
    """
    batch = scoring_batch(groups, overlong_filtering=overlong_filtering)
    if estimates is not None:
        batch.advantages = list(estimates)
    else:
        advantages = _group_advantages(groups, advantage, advantage_epsilon, penalties)
        batch.advantages = [repeated(a, len(r)) for a, r in zip(advantages, batch.responses, strict=True)]
    if groups[0].old_logprobs:
        batch.old_logprobs = [values for g in groups for values in g.old_logprobs]
    if all(g.reference_logprobs for g in groups):
        batch.reference_logprobs = [values for g in groups for values in g.reference_logprobs]
    return batch


def _group_advantages(
    groups: Sequence[PromptGroup], advantage: str, epsilon: float, penalties: Sequence[np.ndarray]
) -> list[float]:
    """One a completion, by a registered rule."""
    rewards = [g.rewards.astype(np.float64) for g in groups]
    if penalties:
        rewards = [r - p for r, p in zip(rewards, penalties, strict=True)]
    lengths = [np.array([len(c.tokens) for c in g.completions]) for g in groups]
    seen = [GroupRewards(r, n, epsilon) for r, n in zip(rewards, lengths, strict=True)]
    return np.concatenate([advantages_of(advantage, group) for group in seen]).tolist()


def scoring_batch(groups: Sequence[PromptGroup], *, overlong_filtering: bool) -> SequenceBatch:
    """All completions of the groups, group after group, weight 1 on what is trained: what log-probs are taken of."""
    completions = [c for g in groups for c in g.completions]
    batch = sequence_batch([g.prompt_tokens for g in groups for _ in g.completions], [c.tokens for c in completions])
    if overlong_filtering:
        for i, completion in enumerate(completions):
            if completion.finish_reason == "length":
                batch.loss_weights[i] = repeated(0.0, len(completion.tokens))
    return batch


def mini_batches(groups: int, samples: int, prompts_per_update: int) -> list[range]:
    """Sequence numbers of each gradient update: whole groups, `prompts_per_update` at a time; the last may hold
    fewer."""
    return [
        range(first * samples, min(first + prompts_per_update, groups) * samples)
        for first in range(0, groups, prompts_per_update)
    ]


def correct_engine_mismatch(batch: SequenceBatch, groups: Sequence[PromptGroup], bound: float) -> tuple[float, float]:
    """Truncated importance sampling: fold min(π_old / π_rollout, bound) into the loss weights, once.

    Corrects the difference between the engine that drew the tokens and the learner. Denominators count tokens and are
    not changed by it. Returns the mean weight and the share of trained tokens at the bound.
    """
    total, bounded, tokens = 0.0, 0, 0
    for i, completion in enumerate(c for g in groups for c in g.completions):
        weights = torch.from_numpy(batch.loss_weights[i].copy())
        trained = weights > 0
        log_ratio = torch.from_numpy(batch.old_logprobs[i] - completion.logprobs)[trained].double()
        ratio = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()
        weight = ratio.clamp(max=bound)
        weights[trained] *= weight.float()
        batch.loss_weights[i] = weights.numpy()
        total += float(weight.sum())
        bounded += int((ratio > bound).sum())
        tokens += len(weight)
    return (total / tokens, bounded / tokens) if tokens else (1.0, 0.0)


def aggregate(batch: SequenceBatch, sequences: Sequence[int], aggregation: str, *, constant_length: int = 1) -> float:
    """Fold the aggregation into the loss weights of a mini-batch's sequences, once.

    Returns the denominator; 0 where no token is trained.

    token-mean (DAPO): every token weighs 1, the denominator is the number of trained tokens.
    sequence-mean (GRPO): a token of a response with n trained tokens weighs 1/n, the denominator is the number of such
    responses.
    constant-length (Dr.GRPO, arXiv 2503.20783): every token weighs 1, the denominator is the number of responses, the
    filtered ones included, times `constant_length`.
    """
    denominator = 0.0
    for sequence in sequences:
        tokens = float(np.count_nonzero(batch.loss_weights[sequence] > 0))
        if aggregation == "sequence-mean" and tokens:
            batch.loss_weights[sequence] = batch.loss_weights[sequence] / np.float32(tokens)
            denominator += 1.0
        else:
            denominator += tokens
    if aggregation == "constant-length" and denominator:
        return float(len(sequences) * constant_length)
    return denominator
