"""What the learner does with one rollout step: old and reference log-probs, then its gradient updates."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import torch

from dapo_megatron.algorithms.entropy_bonus import EntropyBonus, adapted
from dapo_megatron.algorithms.gae import whiten
from dapo_megatron.algorithms.mini_batch import (
    batch_of_groups,
    correct_engine_mismatch,
    mini_batches,
    scoring_batch,
)
from dapo_megatron.algorithms.registry import policy_losses
from dapo_megatron.algorithms.statistics import TokenStatistics, token_statistics
from dapo_megatron.config import Recipe
from dapo_megatron.config.algorithm import Algorithm
from dapo_megatron.critic_step import CriticStep
from dapo_megatron.data.completions import PromptGroup
from dapo_megatron.data.packing import packing_efficiency
from dapo_megatron.divergence import Divergence, charges_rewards, divergence, reward_penalties
from dapo_megatron.learner.learner import Learner
from dapo_megatron.learner.losses import POLICY_SUMS, Head, RowLoss, policy_loss, token_policy_loss
from dapo_megatron.learner.reference import ReferenceWeights
from dapo_megatron.pair_choice import PairSums, total, weigh_pairs
from dapo_megatron.token_choice import TokenChoice, choose_tokens, chooses_tokens, weigh
from dapo_megatron.update_guard import UpdateGuard, described, guarded_update


@dataclass(frozen=True)
class Selection:
    """Shares of the tokens that could be trained on: those that kept their gradient, those that KL-Cov penalised; and
    the seconds that choosing them took on this rank."""

    kept: float
    penalised: float
    seconds: float


@dataclass(frozen=True)
class PolicyStep:
    """Means over the updates of the step, and over its trained tokens. skipped_updates: mini-batches without a trained
    token; refused: those whose update the guard would not have made, which count in `selection` and `pairs` alone."""

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
    engine_weight: float  # mean of the truncated importance weights, 1 without them
    engine_weight_bounded: float  # share of tokens at their bound
    tokens: TokenStatistics | None  # None when nothing was trained
    divergence: Divergence | None = None  # with a reference policy
    waited: bool = False  # for a critic that warms up
    critic: CriticStep | None = None  # with algorithm.advantage=gae
    selection: Selection | None = None  # where the recipe looks at tokens before their gradient
    pairs: PairSums | None = None  # with policy_loss dpo
    entropy_bonus: EntropyBonus | None = None  # where its coefficient adapts
    refused: int = 0


def score_old_policy(
    learner: Learner,
    groups: Sequence[PromptGroup],
    algorithm: Algorithm,
    *,
    kept: Sequence[PromptGroup] = (),
    reference: ReferenceWeights | None = None,
) -> None:
    """Leave log-probs and entropies of the present policy in every group that has none yet: before the first update.

    A group drawn by an earlier policy keeps that policy's. Responses that overlong filtering takes out are not scored,
    theirs stay 0, unless their reward is charged for a KL divergence: it counts in their group's mean. `kept`: groups
    of a later step, scored with the others. `reference`: leave its log-probs too; of one that stays once a group, of
    one that moves anew in the step that trains the group.
    """
    overlong_filtering = algorithm.overlong_filtering and not charges_rewards(algorithm.kl)
    known = [*groups, *kept]
    new = [group for group in known if not group.old_logprobs]
    for group, logprobs, entropies in _score(learner, new, overlong_filtering):
        group.old_logprobs, group.entropies = logprobs, entropies
    if reference is None:
        return
    new = groups if reference.moves else [group for group in known if not group.reference_logprobs]
    if new:
        with reference.in_place() as model:
            for group, logprobs, _ in _score(model, new, overlong_filtering):
                group.reference_logprobs = logprobs


def _score(
    learner: Learner, groups: Sequence[PromptGroup], overlong_filtering: bool
) -> list[tuple[PromptGroup, list[np.ndarray], list[np.ndarray]]]:
    """(group, log-probs, entropies) of the model as it is, fp32 [L] a completion."""
    if not groups:
        return []
    logprobs, entropies = map(iter, learner.score(scoring_batch(groups, overlong_filtering=overlong_filtering)))
    samples = [len(group.completions) for group in groups]
    return [
        (group, list(islice(logprobs, count)), list(islice(entropies, count)))
        for group, count in zip(groups, samples, strict=True)
    ]


def learn_step(
    learner: Learner,
    groups: Sequence[PromptGroup],
    recipe: Recipe,
    *,
    learning_rate: float,
    step: int = 0,
    estimates: Sequence[np.ndarray] | None = None,
    waits: bool = False,
    entropy_coefficient: float | None = None,
    guard: UpdateGuard | None = None,
) -> PolicyStep:
    """One optimizer step for each mini-batch of `algorithm.mini_batch_prompts` prompts, after `score_old_policy`.

    A mini-batch without a trained token is skipped and counted. `step`: the rollout step, for random draws.
    `estimates`: a critic's advantages, fp32 [L] a completion. `waits`: no step at all, while a critic warms up.
    `entropy_coefficient`: where `algorithm.adaptive_entropy` stands; None = where it begins. `guard`: judges every
    update; once it is exhausted no more of them are made.
    """
    algorithm = recipe.algorithm
    kl = algorithm.kl
    penalties = reward_penalties(groups, kl)
    batch = batch_of_groups(
        groups,
        overlong_filtering=algorithm.overlong_filtering,
        advantage_epsilon=algorithm.advantage_epsilon,
        advantage=algorithm.advantage,
        penalties=penalties,
        estimates=estimates,
    )
    if algorithm.whiten:
        batch.advantages = whiten(batch.advantages, [weights > 0 for weights in batch.loss_weights])
    statistics = token_statistics(batch, groups)
    bonus = None
    if algorithm.adaptive_entropy.target is not None and statistics is not None and not waits:
        bonus = _entropy_bonus(algorithm, statistics.entropy, entropy_coefficient)
    engine_weight = (1.0, 0.0)
    if algorithm.importance_bound is not None:
        engine_weight = correct_engine_mismatch(batch, groups, algorithm.importance_bound)
    sums = torch.zeros(len(POLICY_SUMS), dtype=torch.float64)
    norms: list[float] = []
    efficiencies: list[float] = []
    lengths, skipped, refused = batch.lengths, 0, 0
    trained = list(batch.loss_weights)  # before aggregation and selection
    entropies = [values for group in groups for values in group.entropies]
    samples = [len(group.completions) for group in groups]
    responses = [g.prompt_id * max(samples) + i for g, count in zip(groups, samples, strict=True) for i in range(count)]
    choices: list[TokenChoice] = []
    compared: list[PairSums] = []
    prompts = algorithm.mini_batch_prompts
    updates = [] if waits else mini_batches(samples, prompts)
    for update, sequences in enumerate(updates):
        choice = None
        if algorithm.compares_pairs:
            of_update = groups[update * prompts : (update + 1) * prompts]
            compared.append(weigh_pairs(learner, batch, sequences, of_update, algorithm))
            denominator = float(compared[-1].pairs)
        else:
            if chooses_tokens(algorithm):
                key = (recipe.run.seed, step, update)
                choice = choose_tokens(learner, batch, sequences, responses, entropies, algorithm, key)
                choices.append(choice)
            denominator = weigh(batch, sequences, choice, algorithm, constant_length=recipe.rollout.max_response_length)
        if denominator == 0:
            skipped += 1
            continue
        terms = learner.gradients(batch, sequences, recipe_loss(learner.head, algorithm, denominator, bonus))
        norm = guarded_update(
            learner,
            guard,
            float(terms[POLICY_SUMS.index("loss")]),
            learning_rate=learning_rate,
            weight_decay=recipe.optimizer.weight_decay,
            step=step + 1,
            batch=partial(described, groups, sequences),
        )
        if norm is None:
            refused += 1
            if guard.exhausted:
                break
            continue
        sums += terms
        norms.append(norm)
        efficiencies.append(packing_efficiency(lengths, learner.packing(batch, sequences)))
    named = dict(zip(POLICY_SUMS, sums.tolist(), strict=True))
    tokens = max(1.0, named["tokens"])
    apart = None
    if batch.reference_logprobs is not None and statistics is not None:
        columns = (trained, batch.old_logprobs, batch.reference_logprobs)
        log_ratios = ((old - reference)[weights > 0] for weights, old, reference in zip(*columns, strict=True))
        apart = divergence(log_ratios, kl, loss=named["kl_loss"] / max(1, len(norms)), penalties=penalties)
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
        engine_weight=engine_weight[0],
        engine_weight_bounded=engine_weight[1],
        tokens=statistics,
        divergence=apart,
        waited=waits,
        selection=_selection(choices),
        pairs=total(compared) if compared else None,
        entropy_bonus=bonus,
        refused=refused,
    )


def _entropy_bonus(algorithm: Algorithm, entropy: float, coefficient: float | None) -> EntropyBonus:
    """The same on every rank: the entropies are."""
    settings = algorithm.adaptive_entropy
    coefficient = algorithm.entropy_coefficient if coefficient is None else coefficient
    return adapted(coefficient, entropy, target=settings.target, delta=settings.delta, most=settings.max)


def _selection(choices: Sequence[TokenChoice]) -> Selection | None:
    trained = max(1, sum(choice.trained for choice in choices))
    if not choices:
        return None
    return Selection(
        kept=sum(choice.kept_tokens for choice in choices) / trained,
        penalised=sum(choice.penalised_tokens for choice in choices) / trained,
        seconds=sum(choice.seconds for choice in choices),
    )


def recipe_loss(head: Head, algorithm: Algorithm, denominator: float, bonus: EntropyBonus | None = None) -> RowLoss:
    """The policy loss that a recipe chose; the clipped one in its own kernel. `bonus`: in the place of the recipe's."""
    kl, name = algorithm.kl, algorithm.policy_loss
    settings = {
        "denominator": denominator,
        "eps_low": algorithm.eps_low,
        "eps_high": algorithm.eps_high,
        "eps_dual": algorithm.eps_dual,
        "entropy_coefficient": algorithm.entropy_coefficient if bonus is None else bonus.applied,
        "kl_coefficient": kl.coefficient if kl.place == "loss" else 0.0,
        "kl_estimator": kl.estimator,
    }
    if name == "clip":
        return policy_loss(head, **settings)
    return token_policy_loss(head, policy_losses()[name], clips_low=algorithm.cispo.lower_clip, **settings)
