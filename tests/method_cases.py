"""Run on ranks: one rollout step of every method, layout after layout, on the same groups."""

from pathlib import Path

import numpy as np
import torch.distributed as dist

from dapo_megatron.algorithms.mini_batch import batch_of_groups
from dapo_megatron.algorithms.registry import register_token_selection
from dapo_megatron.config import Recipe
from dapo_megatron.config.optimizer import Optimizer
from dapo_megatron.data.completions import PromptGroup
from dapo_megatron.learner.learner import Learner
from dapo_megatron.monitoring.step_metrics import learner_metrics
from dapo_megatron.policy_step import learn_step, score_old_policy
from dapo_megatron.token_choice import choose_tokens, chooses_tokens
from tests.learner.layouts import build
from tests.learner.update_cases import main_gradients, save_whole
from tests.random_groups import SAMPLES, random_groups

CLIP_COV = {"kind": "clip-cov", "cov_ratio": 0.05, "cov_low": 0.1, "cov_high": 3.0}
METHODS = {
    "clip": {},
    "rloo": {"advantage": "leave-one-out", "loss_aggregation": "constant-length", "eps_dual": 2.0},
    "gspo": {
        "policy_loss": "gspo", "loss_aggregation": "sequence-mean", "eps_low": 0.01, "eps_high": 0.01,
        "entropy_coefficient": 0.02,
    },
    "cispo": {"policy_loss": "cispo", "kl": {"coefficient": 0.3, "estimator": "k2"}},
    "cispo, lower, sequence-mean": {
        "policy_loss": "cispo", "cispo": {"lower_clip": True}, "loss_aggregation": "sequence-mean",
    },
    "kl-cov": {"policy_loss": "kl-cov", "kl_cov": {"ratio": 0.1, "beta": 2.0}},
    "kl-cov, current, high-entropy": {
        "policy_loss": "kl-cov", "kl_cov": {"ratio": 0.1}, "statistics": "current",
        "token_selection": {"kind": "high-entropy", "ratio": 0.5, "denominator": "all"},
    },
    "high-entropy, kept": {"token_selection": {"kind": "high-entropy"}},
    "high-entropy, all": {
        "token_selection": {"kind": "high-entropy", "denominator": "all"}, "loss_aggregation": "sequence-mean",
    },
    "low-entropy": {"token_selection": {"kind": "low-entropy", "ratio": 0.8}, "statistics": "current"},
    "low-probability": {"token_selection": {"kind": "low-probability", "threshold": 0.02}},
    "clip-cov": {"token_selection": CLIP_COV},
    "clip-cov, current": {"token_selection": CLIP_COV, "statistics": "current"},
    "dpo": {"policy_loss": "dpo", "dpo": {"beta": 0.3, "label_smoothing": 0.1}},
    "dpo, current": {"policy_loss": "dpo", "statistics": "current", "dpo": {"beta": 0.2, "pairs": "all"}},
    "own selection": {"token_selection": {"kind": "own-of-tests", "ratio": 0.7}},
    "adaptive entropy": {"entropy_coefficient": 0.02, "adaptive_entropy": {"target": 10.0, "delta": 0.01}},
    "adaptive entropy, above": {"entropy_coefficient": 0.02, "adaptive_entropy": {"target": 0.1, "delta": 0.01}},
    "high-entropy, micro_batch": {"token_selection": {"kind": "high-entropy"}, "statistics": "micro_batch"},
}  # fmt: skip
STANDS = {"adaptive entropy": 0.05, "adaptive entropy, above": 0.05}  # the coefficient that earlier steps have left


@register_token_selection("own-of-tests", "a random share of the tokens that are not surely drawn")
def own_selection(tokens, settings):
    return (tokens.uniform() < settings.ratio) & (tokens.entropies_N > np.quantile(tokens.entropies_N, 0.1))


def recipe(name: str) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"directory": "out", "seed": 5},
            "model": {"path": "hf"},
            "algorithm": {"mini_batch_prompts": 2} | METHODS[name],
            "rollout": {"max_response_length": 24, "samples_per_prompt": SAMPLES},
            "optimizer": {"weight_decay": 0.0},
        }
    )


def groups(seed: int, count: int = 4) -> list[PromptGroup]:
    """Rewards differ within each group; one response of each is truncated."""
    return random_groups(seed, count, lengths=(5, 24), rewards=lambda rng: rng.normal(size=SAMPLES))


def moved_groups(learner: Learner) -> list[PromptGroup]:
    """Old log-probs away from the present ones, so that every bound is met."""
    found, rng = groups(1), np.random.default_rng(2)
    score_old_policy(learner, found, recipe("clip").algorithm)
    for group in found:
        present = group.old_logprobs
        group.present_logprobs = present
        group.old_logprobs = [(p + 0.4 * rng.normal(size=len(p))).astype(np.float32) for p in present]
        group.reference_logprobs = [(p + 0.4 * rng.normal(size=len(p))).astype(np.float32) for p in present]
    return found


def every_method(payload: dict) -> dict[str, dict]:
    """{"layout budget method": facts}; whole gradients of each method's last update in files, at the first budget."""
    report: dict[str, dict] = {}
    for layout in payload["layouts"]:
        for budget in payload["budgets"]:
            settings = Optimizer(distributed=False, gradient_clip=1e9)
            learner = build(payload["model"], layout, budget=budget, train=settings, temperature=0.9)
            trained_on = moved_groups(learner)
            report[f"{layout}|{budget}"] = _tokens(trained_on)
            for name in payload["methods"]:
                case = f"{layout}|{budget}|{name}"
                report[case] = _facts(learner, trained_on, name)
                if budget == payload["budgets"][0]:
                    path = Path(payload["out"]) / f"{dist.get_world_size()}|{case}"
                    save_whole(learner, main_gradients(learner), path)
    return report


def _tokens(of: list[PromptGroup]) -> dict[str, list[list[list[float]]]]:
    """[group][completion][token] of everything that a loss looks at."""
    names = ("present_logprobs", "old_logprobs", "reference_logprobs", "entropies")
    return {name: [[values.tolist() for values in getattr(group, name)] for group in of] for name in names}


def _facts(learner: Learner, trained_on: list[PromptGroup], name: str) -> dict:
    chosen = recipe(name)
    weights: list[list[float]] = []
    penalties: list[list[float]] = []
    advantages: list[list[float]] = []

    gradients = learner.gradients

    def seen(batch, sequences, loss):
        weights.append([w for s in sequences for w in batch.loss_weights[s].tolist()])
        advantages.append([a for s in sequences for a in batch.advantages[s].tolist()])
        if batch.penalties is not None:
            penalties.append([w for s in sequences for w in batch.penalties[s].tolist()])
        return gradients(batch, sequences, loss)

    learner.gradients = seen
    step = learn_step(learner, trained_on, chosen, learning_rate=0.0, step=3, entropy_coefficient=STANDS.get(name))
    del learner.gradients
    return {
        "weights": weights, "penalties": penalties, "advantages": advantages,
        "loss": step.loss, "norm": step.grad_norm, "ratio": step.ratio,
        "low": step.clip_low, "high": step.clip_high, "tokens": step.trained_tokens,
        "kept": step.selection.kept if step.selection else 1.0,
        "kl": step.divergence.loss if step.divergence else 0.0,
        "bonus": {k: v for k, v in learner_metrics(step).items() if k.startswith("entropy/coefficient")},
        "pairs": vars(step.pairs) if step.pairs else {},
    }  # fmt: skip


def first_update(payload: dict) -> dict[str, list[bool]]:
    """For each method that chooses tokens: whether `old` and `current` choose the same before the first update."""
    learner = build(payload["model"], payload["layout"], budget=100, temperature=0.9)
    fresh = groups(4)
    score_old_policy(learner, fresh, recipe("clip").algorithm)
    batch = batch_of_groups(fresh, overlong_filtering=True, advantage_epsilon=1e-6)
    entropies = [values for group in fresh for values in group.entropies]
    rows = range(len(batch))
    same: dict[str, list[bool]] = {}
    for name in METHODS:
        algorithm = recipe(name).algorithm
        if not chooses_tokens(algorithm) or algorithm.statistics == "micro_batch":
            continue
        both = [algorithm.model_copy(update={"statistics": which}) for which in ("old", "current")]
        old, current = (choose_tokens(learner, batch, rows, rows, entropies, a, (0, 0, 0)) for a in both)
        pairs = (zip(old.kept, current.kept, strict=True), zip(old.penalised, current.penalised, strict=True))
        same[name] = [all((a == b).all() for a, b in pair) for pair in pairs]
    return same
