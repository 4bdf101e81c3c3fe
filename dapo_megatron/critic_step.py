"""The critic's part of one rollout step (`algorithm.advantage=gae`): values and advantages a token before the policy
moves, then the critic's own gradient updates."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from dapo_megatron.algorithms.gae import explained_variance, generalized_advantages, token_rewards
from dapo_megatron.algorithms.mini_batch import mini_batches, scoring_batch
from dapo_megatron.config import Recipe
from dapo_megatron.data.completions import PromptGroup
from dapo_megatron.data.records import SequenceBatch
from dapo_megatron.divergence import token_penalties
from dapo_megatron.learner.learner import Learner
from dapo_megatron.learner.losses import VALUE_SUMS, value_loss
from dapo_megatron.update_guard import UpdateGuard, described, guarded_update


@dataclass(frozen=True)
class Estimates:
    """What the critic says of the completions of a step's `groups`. batch: with its values and
    returns. advantages: fp32 [L] each; those of a response without a loss weight mean nothing. seconds: spent on it."""

    groups: Sequence[PromptGroup]
    batch: SequenceBatch
    advantages: list[np.ndarray]
    seconds: float

    @property
    def samples(self) -> list[int]:
        """Completions of each group."""
        return [len(group.completions) for group in self.groups]


@dataclass(frozen=True)
class CriticStep:
    """loss, grad_norm: means over updates. clipped: share of tokens beyond the clip. All three are 0 without an update.
    value, target, explained_variance: over the step's trained tokens, before the updates. seconds: estimates and
    updates."""

    loss: float
    grad_norm: float
    clipped: float
    value: float
    target: float
    explained_variance: float
    updates: int
    seconds: float


def estimate(critic: Learner, groups: Sequence[PromptGroup], recipe: Recipe) -> Estimates:
    """Values of the critic as it is, and GAE over every response; after `score_old_policy`.

    The reward is at the last token, less, with algorithm.kl.place=reward, each token's own divergence.
    """
    started = time.perf_counter()
    algorithm = recipe.algorithm
    batch = scoring_batch(groups, overlong_filtering=algorithm.overlong_filtering)
    batch.old_values = critic.values(batch)
    rewards = [float(reward) for group in groups for reward in group.rewards]
    penalties = token_penalties(groups, algorithm.kl) or [None] * len(rewards)
    advantages, batch.returns = [], []
    for reward, penalties_L, values_L in zip(rewards, penalties, batch.old_values, strict=True):
        rewards_L = token_rewards(reward, len(values_L), penalties_L)
        found = generalized_advantages(rewards_L, values_L, gamma=algorithm.gae.gamma, lam=algorithm.gae.lam)
        advantages.append(found[0])
        batch.returns.append(found[1])
    return Estimates(groups, batch, advantages, time.perf_counter() - started)


def critic_step(
    critic: Learner, estimates: Estimates, recipe: Recipe, *, step: int = 0, guard: UpdateGuard | None = None
) -> CriticStep:
    """`critic.epochs` passes over the step, an update for each mini-batch on the mean over its trained tokens. `step`:
    the rollout step, for records of the guard, which judges every update."""
    started = time.perf_counter()
    settings, algorithm, batch = recipe.critic, recipe.algorithm, estimates.batch
    sums, norms = torch.zeros(len(VALUE_SUMS), dtype=torch.float64), []
    updates = mini_batches(estimates.samples, algorithm.mini_batch_prompts) * settings.epochs
    for sequences in updates:
        tokens = sum(np.count_nonzero(batch.loss_weights[s]) for s in sequences)
        if not tokens or (guard is not None and guard.exhausted):
            continue
        terms = critic.gradients(batch, sequences, value_loss(denominator=float(tokens), clip=settings.value_clip))
        norm = guarded_update(
            critic,
            guard,
            float(terms[VALUE_SUMS.index("loss")]),
            learning_rate=settings.learning_rate,
            weight_decay=recipe.optimizer.weight_decay,
            step=step + 1,
            batch=partial(described, estimates.groups, sequences),
        )
        if norm is None:
            continue
        sums += terms
        norms.append(norm)
    named = dict(zip(VALUE_SUMS, sums.tolist(), strict=True))
    trained = [i for i, weights in enumerate(batch.loss_weights) if weights.any()]
    values, returns = ([column[i] for i in trained] for column in (batch.old_values, batch.returns))
    count = max(1, sum(map(len, values)))
    return CriticStep(
        loss=named["loss"] / max(1, len(norms)),
        grad_norm=sum(norms) / max(1, len(norms)),
        clipped=named["clipped"] / max(1.0, named["tokens"]),
        value=sum(float(v.sum(dtype=np.float64)) for v in values) / count,
        target=sum(float(r.sum(dtype=np.float64)) for r in returns) / count,
        explained_variance=explained_variance(returns, values),
        updates=len(norms),
        seconds=estimates.seconds + time.perf_counter() - started,
    )
