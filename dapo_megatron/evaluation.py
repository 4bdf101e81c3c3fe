"""Accuracy on held-out prompts: mean over k samples a prompt, and greedy."""

from collections.abc import Sequence

import numpy as np

from dapo_megatron.config import Recipe
from dapo_megatron.data.completions import PromptGroup
from dapo_megatron.rollout.groups import GroupSampler


def evaluate(sampler: GroupSampler, recipe: Recipe) -> tuple[dict[str, float], list[PromptGroup]]:
    """`validation/accuracy` = avg@k over `evaluation.samples`, `validation/accuracy_greedy`, mean response length; the
    sampled groups.

    The same seeds are used each time, so two evaluations of equal weights agree.
    """
    settings = recipe.evaluation
    rows = range(len(sampler.prompts))[: settings.max_prompts]
    groups = sampler.draw(
        rows,
        samples=settings.samples,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed_key=(settings.seed, 3),
    )
    metrics = {
        "validation/accuracy": _mean_accuracy(groups),
        "validation/response_length": float(np.mean([len(c.tokens) for g in groups for c in g.completions])),
    }
    if settings.greedy:
        greedy = sampler.draw(rows, samples=1, temperature=0.0, top_p=1.0, seed_key=(settings.seed, 4))
        metrics["validation/accuracy_greedy"] = _mean_accuracy(greedy)
    return metrics, groups


def _mean_accuracy(groups: Sequence[PromptGroup]) -> float:
    return float(np.mean([g.accuracies.mean() for g in groups]))
