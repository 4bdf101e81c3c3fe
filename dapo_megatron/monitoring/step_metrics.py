"""The numbers of one rollout step, under the keys of metrics.jsonl."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np

from dapo_megatron.monitoring.histograms import histogram
from dapo_megatron.policy_step import PolicyStep
from dapo_megatron.rollout.dynamic_sampling import SampledStep

QUANTILES = (10, 50, 90, 99)  # of response lengths, percent


class Clock:
    """Seconds of a step's phases and of the whole. `mark`: what else is to be around a phase, by name."""

    def __init__(self, mark: Callable[[str], AbstractContextManager] = nullcontext) -> None:
        self._mark = mark
        self._started = time.perf_counter()
        self._phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        with self._mark(name):
            yield
        self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - started

    def metrics(self) -> dict[str, float]:
        """`time/{phase}` and `time/step`, seconds so far."""
        return {f"time/{name}": seconds for name, seconds in self._phases.items()} | {
            "time/step": time.perf_counter() - self._started
        }


def rollout_metrics(sampled: SampledStep) -> dict[str, Any]:
    """Over all generated responses, those of dropped groups included. Of groups from a file, which nobody drew or
    graded, lengths alone."""
    groups = sampled.generated
    counts = {
        "groups/trained": float(len(sampled.trained)),
        "groups/reused": float(sampled.reused),
        "groups/kept": float(len(sampled.kept)),
        "groups/aged": float(sampled.aged),
        "groups/shortfall": float(sampled.shortfall),
        "groups/generated": float(len(groups)),
        "groups/acceptance": sampled.acceptance,
        "groups/waves": float(sampled.waves),
        **_segment_metrics(sampled),
    }
    if not groups:  # surplus of earlier steps was enough
        return counts | {"tokens/generated": 0.0}
    completions = [c for g in groups for c in g.completions]
    lengths = np.array([len(c.tokens) for c in completions])
    return counts | {
        **_grades(sampled),
        "response_length/mean": float(lengths.mean()),
        **{f"response_length/p{q}": float(np.percentile(lengths, q)) for q in QUANTILES},
        "response_length/max": float(lengths.max()),
        "histogram/response_length": histogram(lengths),
        "responses/generated": float(sum(len(g.completions) for g in groups if g.drawn)),
        "truncated_fraction": float(np.mean([c.finish_reason == "length" for c in completions])),
        "tokens/generated": float(sum(g.generated_tokens for g in groups)),
    }


def _grades(sampled: SampledStep) -> dict[str, Any]:
    """Nothing where no group was drawn."""
    groups = [g for g in sampled.generated if g.drawn]
    if not groups:
        return {}
    right = np.array([g.accuracies.mean() for g in groups])
    rewards = np.concatenate([g.rewards for g in groups])
    return {
        "accuracy/train": float(right.mean()),
        "groups/all_right": float((right == 1).mean()),
        "groups/all_wrong": float((right == 0).mean()),
        "reward/mean": float(rewards.mean(dtype=np.float64)),
        "reward/std": float(rewards.std()),
        "histogram/reward": histogram(rewards),
    }


def _segment_metrics(sampled: SampledStep) -> dict[str, float]:
    """Of the groups trained on, and continuations of all that were generated; nothing for independent responses."""
    trained = [g.counts for g in sampled.trained if g.counts is not None]
    if not trained:
        return {}
    segments = sum(c.segments for c in trained)
    return {
        "segments/valued": float(segments),
        "segments/dropped": sum(c.dropped for c in trained) / max(1, segments),
        "segments/repeated_tokens": float(sum(c.repeated for c in trained)),
        "segments/continuations": float(sum(g.counts.continuations for g in sampled.generated if g.counts is not None)),
    }


def generated_per_trained(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Tokens drawn in a step, those of dropped groups and of value estimates included, a token trained on in it."""
    trained = metrics.get("tokens/trained", 0.0)
    return {"tokens/generated_per_trained": metrics["tokens/generated"] / trained} if trained else {}


def learner_metrics(result: PolicyStep | None) -> dict[str, float]:
    """Over the trained tokens; a step that trained on nothing has tokens/trained 0 and little else. While a critic
    warms up there is nothing of the policy's updates."""
    if result is None or result.tokens is None:
        return {"tokens/trained": 0.0}
    tokens = result.tokens
    found = {
        "entropy/mean": tokens.entropy,
        "probability/mean": tokens.probability,
        "covariance/mean": tokens.covariance,
        "covariance/top": tokens.covariance_top,
        "mismatch/log_ratio_mean": tokens.log_ratio,
        "mismatch/logprob_abs_mean": tokens.log_ratio_abs,
        "mismatch/logprob_abs_max": tokens.log_ratio_abs_max,
        "mismatch/weight_mean": result.engine_weight,
        "mismatch/weight_bounded": result.engine_weight_bounded,
        **_divergence_metrics(result),
        **critic_metrics(result),
        **_selection_metrics(result),
        **_pair_metrics(result),
        **_bonus_metrics(result),
    }
    if result.waited:
        return found
    if result.refused and not result.updates:  # means over no update mean nothing
        return found | {"tokens/trained": 0.0, "updates": 0.0, "updates/skipped": float(result.skipped_updates)}
    return found | {
        "clip_fraction/low": result.clip_low,
        "clip_fraction/high": result.clip_high,
        "clip_fraction/dual": result.clip_dual,
        "ratio/mean": result.ratio,
        "loss/policy": result.loss,  # with dpo the sum whose gradient is taken; its value is loss/pairs
        "grad_norm": result.grad_norm,
        "tokens/trained": float(result.trained_tokens),
        "updates": float(result.updates),
        "updates/skipped": float(result.skipped_updates),
        "packing/efficiency": result.packing_efficiency,
    }


def _selection_metrics(result: PolicyStep) -> dict[str, float]:
    """Nothing where every trained token keeps its gradient and none is penalised."""
    chosen = result.selection
    if chosen is None:
        return {}
    return {
        "selection/kept": chosen.kept,
        "selection/penalised": chosen.penalised,
        "selection/seconds": chosen.seconds,
    }


def _bonus_metrics(result: PolicyStep) -> dict[str, float]:
    """Weight of the entropy bonus in this step's losses, and the coefficient of the next; nothing where it is fixed."""
    bonus = result.entropy_bonus
    return {} if bonus is None else {"entropy/coefficient": bonus.applied, "entropy/coefficient_next": bonus.following}


def _pair_metrics(result: PolicyStep) -> dict[str, float]:
    """Means over the step's pairs, margins and log-probs in nats a response; nothing without pairs of DPO."""
    sums = result.pairs
    if sums is None:
        return {}
    pairs = max(1, sums.pairs)
    return {
        "pairs/trained": float(sums.pairs),
        "pairs/groups_left_out": float(sums.left_out),
        "loss/pairs": sums.loss / pairs,
        "pairs/margin": (sums.better_gap - sums.worse_gap) / pairs,
        "pairs/right": sums.right / pairs,
        "pairs/chosen_logprob": sums.better / pairs,
        "pairs/rejected_logprob": sums.worse / pairs,
        "pairs/chosen_gap": sums.better_gap / pairs,
        "pairs/rejected_gap": sums.worse_gap / pairs,
    }


def _divergence_metrics(result: PolicyStep) -> dict[str, float]:
    """kl/mean is k3, kl/k1 or kl/k2 the recipe's estimator where it is another; nothing without a KL term."""
    apart = result.divergence
    if apart is None:
        return {}
    chosen = {} if apart.estimator == "k3" else {f"kl/{apart.estimator}": apart.chosen}
    return {"kl/mean": apart.mean, "kl/loss": apart.loss, "kl/reward": apart.penalty, **chosen}


def critic_metrics(result: PolicyStep) -> dict[str, float]:
    """Nothing without a critic; explained variance is left out where all returns are equal, means over updates where
    none was made."""
    critic = result.critic
    if critic is None:
        return {}
    variance = critic.explained_variance
    known = {} if math.isnan(variance) else {"critic/explained_variance": variance}
    if critic.updates:
        known |= {
            "critic/loss": critic.loss,
            "critic/grad_norm": critic.grad_norm,
            "critic/clip_fraction": critic.clipped,
        }
    return known | {
        "critic/value_mean": critic.value,
        "critic/return_mean": critic.target,
        "critic/updates": float(critic.updates),
        "time/critic": critic.seconds,
    }
