"""What the learner does with one rollout step: old log-probs, then its gradient updates."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dapo_megatron.algorithms.mini_batch import aggregate, mini_batches
from dapo_megatron.config import Recipe
from dapo_megatron.data.packing import packing_efficiency
from dapo_megatron.data.records import SequenceBatch
from dapo_megatron.learner.learner import Learner
from dapo_megatron.learner.losses import POLICY_SUMS, policy_loss


@dataclass(frozen=True)
class PolicyStep:
    """Means over the updates of the step, and the old policy's log-probs and entropies of the trained tokens."""

    loss: float
    grad_norm: float
    clip_low: float
    clip_high: float
    clip_dual: float
    ratio: float
    trained_tokens: int
    updates: int
    skipped_updates: int
    packing_efficiency: float
    old_logprobs: Tensor
    entropy: Tensor
    rollout_logprobs: Tensor


def score_old_policy(learner: Learner, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
    """Log-probs (also left in `batch.old_logprobs_T`) and entropies, [T], before the first update."""
    logprobs, entropy = learner.score(batch)
    batch.old_logprobs_T = logprobs
    return logprobs, entropy


def learn_step(
    learner: Learner, batch: SequenceBatch, entropy_T: Tensor, recipe: Recipe, *, samples: int, learning_rate: float
) -> PolicyStep:
    """One optimizer step for each mini-batch of `algorithm.mini_batch_prompts` prompts.

    `samples`: responses a group. A mini-batch without a trained token is skipped and counted. The aggregation is folded
    into the weights of `batch` in place.
    """
    algorithm = recipe.algorithm
    trained = batch.loss_weights_T > 0
    sums = torch.zeros(len(POLICY_SUMS), dtype=torch.float64)
    norms: list[float] = []
    efficiencies: list[float] = []
    skipped = 0
    for sequences in mini_batches(len(batch) // samples, samples, algorithm.mini_batch_prompts):
        denominator = aggregate(batch, sequences, algorithm.loss_aggregation)
        if denominator == 0:
            skipped += 1
            continue
        loss = policy_loss(
            learner.head,
            denominator=denominator,
            eps_low=algorithm.eps_low,
            eps_high=algorithm.eps_high,
            eps_dual=algorithm.eps_dual,
            entropy_coefficient=algorithm.entropy_coefficient,
        )
        sums += learner.gradients(batch, sequences, loss)
        norms.append(learner.step(learning_rate, recipe.optimizer.weight_decay))
        efficiencies.append(_efficiency(learner, batch, sequences))
    named = dict(zip(POLICY_SUMS, sums.tolist(), strict=True))
    tokens = max(1.0, named["tokens"])
    return PolicyStep(
        loss=named["loss"] / max(1, len(norms)),
        grad_norm=sum(norms) / max(1, len(norms)),
        clip_low=named["clip_low"] / tokens,
        clip_high=named["clip_high"] / tokens,
        clip_dual=named["clip_dual"] / tokens,
        ratio=named["ratio"] / tokens,
        trained_tokens=int(named["tokens"]),
        updates=len(norms),
        skipped_updates=skipped,
        packing_efficiency=sum(efficiencies) / max(1, len(efficiencies)),
        old_logprobs=batch.old_logprobs_T[trained],
        entropy=entropy_T[trained],
        rollout_logprobs=batch.rollout_logprobs_T[trained],
    )


def _efficiency(learner: Learner, batch: SequenceBatch, sequences: Sequence[int]) -> float:
    return packing_efficiency(batch.lengths.tolist(), learner.packing(batch, sequences))
