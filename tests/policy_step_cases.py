"""Run on ranks: rollout steps with a reference policy and with groups kept from an earlier step."""

from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from dapo_megatron.algorithms.mini_batch import batch_of_groups
from dapo_megatron.config import Recipe
from dapo_megatron.config.optimizer import Optimizer
from dapo_megatron.data.completions import PromptGroup
from dapo_megatron.learner.reference import ReferenceWeights
from dapo_megatron.policy_step import PolicyStep, learn_step, score_old_policy
from tests.learner.layouts import build
from tests.learner.reference_cases import moving
from tests.random_groups import random_groups

RATE = 3e-3


def recipe(**kl: object) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"directory": "out"},
            "model": {"path": "hf"},
            "algorithm": {"kl": kl, "mini_batch_prompts": 2, "eps_low": 1.0, "eps_high": 1e6},
            "rollout": {"max_response_length": 20},
            "optimizer": {"weight_decay": 0.0},
        }
    )


def groups(seed: int, count: int = 2) -> list[PromptGroup]:
    """Of 3 responses each, rewards 1, −1, −1; the last response of each group is truncated."""
    return random_groups(seed, count, lengths=(3, 20), rewards=lambda _: np.array([1.0, -1.0, -1.0]))


def steps(payload: dict) -> dict:
    """Two rollout steps at TP 2; the reference's log-probs again at PP 2, from the folder."""
    learner = build(payload["model"], "tp2pp1", train=Optimizer(learning_rate=RATE), temperature=0.9)
    reference = ReferenceWeights(learner)
    in_loss = recipe(coefficient=0.2, place="loss", estimator="k2")
    trained, kept = groups(1), groups(2)
    for part in (trained, kept):  # packed as they are below, so that equal means equal to the bit
        score_old_policy(learner, part, in_loss.algorithm, reference=reference)
    first = learn_step(learner, trained, in_loss, learning_rate=RATE)
    for _ in range(3):
        learn_step(learner, trained, in_loss, learning_rate=RATE)

    before = _scores(learner, kept)
    fresh = groups(3)
    score_old_policy(learner, fresh, in_loss.algorithm, kept=kept, reference=reference)
    with reference.in_place():
        inside = _scores(learner, kept)
    after = _scores(learner, kept)
    report: dict = {
        "first": _facts(first),
        # at learning rate 0 the policy stays, so that all of these see the same one
        "kept": _facts(learn_step(learner, kept, in_loss, learning_rate=0.0)),
        "fresh": _facts(learn_step(learner, fresh, in_loss, learning_rate=0.0)),
        "reference moved by scoring": _gap(_reference_scores(kept), inside),
        "policy moved by swapping": _gap(before, after),
        "policy from reference": _gap(before, inside),
        "rewards": [g.rewards.tolist() for g in kept],
    }

    report["trained rows alone"] = _same_without_untrained_rows(learner, fresh)

    charged = groups(3)
    in_reward = recipe(coefficient=0.05, place="reward", estimator="k1")
    score_old_policy(learner, charged, in_reward.algorithm, reference=reference)
    advantages: list[float] = []

    def seen(batch, sequences, loss, gradients=learner.gradients):
        for weights, values in zip(batch.loss_weights, batch.advantages, strict=True):
            advantages.extend(values[weights > 0].tolist())
        return gradients(batch, sequences, loss)

    learner.gradients = seen
    report["in reward"] = _facts(learn_step(learner, charged, in_reward, learning_rate=0.0)) | {
        "advantages": advantages,
        "old": [[values.tolist() for values in g.old_logprobs] for g in charged],
        "reference": [[values.tolist() for values in g.reference_logprobs] for g in charged],
    }

    other = build(payload["model"], "tp1pp2", temperature=0.9)
    from_folder = ReferenceWeights(other, folder=Path(payload["model"]))
    for weight in other.weights.values():
        weight.zero_()
    with from_folder.in_place():
        report["reference at another layout"] = _gap(_reference_scores(kept), _scores(other, kept))
    report["zeroed weights"] = float(sum(w.abs().sum() for w in other.weights.values()))
    return report | {"moving": moving(payload["model"], groups)}


def _same_without_untrained_rows(learner, of: list[PromptGroup]) -> bool:
    """Whether rows of no weight, each group's third here, are neither forwarded nor missed."""
    batch = batch_of_groups(of, overlong_filtering=True, advantage_epsilon=0.0)
    assert not any(batch.loss_weights[s].any() for s in range(2, len(batch), 3)), "the third responses are truncated"
    trained = [s for s in range(len(batch)) if s % 3 != 2]
    columns = {f.name: getattr(batch, f.name) for f in fields(batch)}
    part = replace(batch, **{name: [values[s] for s in trained] for name, values in columns.items() if values})
    forwarded = sorted(s for rank in learner.packing(batch, range(len(batch))) for pack in rank for s in pack)
    whole, alone = learner.score(batch), learner.score(part)
    return forwarded == trained and all(
        np.array_equal(whole[kind][s], alone[kind][i]) for kind in (0, 1) for i, s in enumerate(trained)
    )


def _facts(step: PolicyStep) -> dict:
    apart = step.divergence
    return {
        "ratio": step.ratio, "mean": apart.mean, "chosen": apart.chosen, "loss": apart.loss, "penalty": apart.penalty,
        "whole loss": step.loss, "tokens": step.trained_tokens, "norm": step.grad_norm,
    }  # fmt: skip


def _scores(learner, of: list[PromptGroup]) -> np.ndarray:
    batch = batch_of_groups(of, overlong_filtering=True, advantage_epsilon=0.0)
    return np.concatenate(learner.score(batch)[0])


def _reference_scores(of: list[PromptGroup]) -> np.ndarray:
    return np.concatenate([values for group in of for values in group.reference_logprobs])


def _gap(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())
