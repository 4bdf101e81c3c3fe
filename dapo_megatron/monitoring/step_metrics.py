"""The numbers of one rollout step, under the keys of metrics.jsonl."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from dapo_megatron.policy_step import PolicyStep
from dapo_megatron.rollout.dynamic_sampling import SampledStep


class Clock:
    """Seconds of a step's phases and of the whole."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._phases: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - started

    def metrics(self) -> dict[str, float]:
        """`time/{phase}` and `time/step`, seconds so far."""
        return {f"time/{name}": seconds for name, seconds in self._phases.items()} | {
            "time/step": time.perf_counter() - self._started
        }


def rollout_metrics(sampled: SampledStep) -> dict[str, float]:
    """Over all generated responses, those of dropped groups included."""
    groups = sampled.generated
    completions = [c for g in groups for c in g.completions]
    lengths = np.array([len(c.tokens) for c in completions])
    right = np.array([g.accuracies.mean() for g in groups])
    return {
        "accuracy/train": float(right.mean()),
        "reward/mean": float(np.mean([g.rewards.mean() for g in groups])),
        "response_length/mean": float(lengths.mean()),
        "response_length/max": float(lengths.max()),
        "groups/all_right": float((right == 1).mean()),
        "groups/all_wrong": float((right == 0).mean()),
        "groups/trained": float(len(sampled.trained)),
        "groups/waves": float(sampled.waves),
        "truncated_fraction": float(np.mean([c.finish_reason == "length" for c in completions])),
        "tokens/generated": float(lengths.sum()),
    }


def learner_metrics(result: PolicyStep | None) -> dict[str, float]:
    """Over the trained tokens; a step that trained on nothing has tokens/trained 0 and little else."""
    if result is None or result.trained_tokens == 0:
        return {"tokens/trained": 0.0}
    gap = (result.old_logprobs - result.rollout_logprobs).double()
    return {
        "entropy/mean": float(result.entropy.double().mean()),
        "probability/mean": float(result.old_logprobs.double().exp().mean()),
        "clip_fraction/low": result.clip_low,
        "clip_fraction/high": result.clip_high,
        "clip_fraction/dual": result.clip_dual,
        "ratio/mean": result.ratio,
        "loss/policy": result.loss,
        "grad_norm": result.grad_norm,
        "mismatch/logprob_abs_mean": float(gap.abs().mean()),
        "mismatch/logprob_abs_max": float(gap.abs().max()),
        "tokens/trained": float(result.trained_tokens),
        "updates": float(result.updates),
        "updates/skipped": float(result.skipped_updates),
        "packing/efficiency": result.packing_efficiency,
    }
