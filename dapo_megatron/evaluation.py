"""Accuracy on held-out prompts from k samples a prompt, in training and in `dapo-megatron evaluate` alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dapo_megatron.algorithms.estimators import clustered_standard_error, majority_at_k, pass_at_k
from dapo_megatron.config import Recipe
from dapo_megatron.data.completions import PromptGroup
from dapo_megatron.rewards.rule import final_answer
from dapo_megatron.rollout.engine import Fork
from dapo_megatron.rollout.groups import GroupSampler


@dataclass(frozen=True)
class Scores:
    """What k = `samples` graded samples of each of `problems` problems say.

    avg_at_k: mean accuracy. standard_error: of avg_at_k over the problems; NaN for a single one.
    pass_at: k' → mean chance that one of k' samples is right, k' = 1, 2, 4 … and k. maj_at_k: share of problems whose
    most frequent answer is right. answered: share of responses with a final answer. Both are None where responses have
    no final answers that a majority could vote on (programs, scores of a reward model). Lengths in tokens.
    """

    problems: int
    samples: int
    avg_at_k: float
    standard_error: float
    pass_at: dict[int, float]
    maj_at_k: float | None
    answered: float | None
    length_mean: float
    length_max: int
    truncated_fraction: float

    @property
    def pass_at_k(self) -> float:
        """pass@k with all samples: the share of problems that any of them solves."""
        return self.pass_at[self.samples]


def evaluate(sampler: GroupSampler, recipe: Recipe) -> tuple[dict[str, float], list[PromptGroup]]:
    """`validation/…` metrics over `evaluation.samples` samples a prompt, and the sampled groups.

    accuracy = avg@k, pass = pass@k, majority = maj@k, standard_error of accuracy, response_length (mean, tokens),
    truncated_fraction; accuracy_greedy of one more response a prompt.
    """
    settings = recipe.evaluation
    groups = sample_problems(sampler, recipe)
    scores = score(groups, votes=recipe.reward.answers_are_counted)
    metrics = {
        "validation/accuracy": scores.avg_at_k,
        "validation/pass": scores.pass_at_k,
        "validation/standard_error": scores.standard_error,
        "validation/response_length": scores.length_mean,
        "validation/truncated_fraction": scores.truncated_fraction,
    }
    if scores.maj_at_k is not None:
        metrics["validation/majority"] = scores.maj_at_k
    if settings.greedy:
        rows = range(len(groups))
        greedy = sampler.draw(rows, samples=1, temperature=0.0, top_p=1.0, seed_key=(settings.seed, 4))
        metrics["validation/accuracy_greedy"] = float(np.mean([g.accuracies.mean() for g in greedy]))
    return metrics, groups


def sample_problems(sampler: GroupSampler, recipe: Recipe) -> list[PromptGroup]:
    """`evaluation.samples` graded samples of the first `evaluation.max_prompts` prompts.

    The same seeds are used each time, so two evaluations of equal weights agree.
    """
    settings = recipe.evaluation
    hot = settings.fork_temperature
    return sampler.draw(
        range(len(sampler.prompts))[: settings.max_prompts],
        samples=settings.samples,
        temperature=settings.temperature,
        top_p=settings.top_p,
        fork=None if hot is None else Fork(hot, settings.entropy_threshold),
        seed_key=(settings.seed, 3),
    )


def score(groups: Sequence[PromptGroup], *, votes: bool = True) -> Scores:
    """The scores of graded groups of equal size; at least one group. `votes`: whether final answers are counted."""
    samples = len(groups[0].completions)
    right_PK = np.stack([g.accuracies for g in groups]).astype(bool)
    answers = [[final_answer(response) for response in g.responses] for g in groups] if votes else []
    completions = [c for g in groups for c in g.completions]
    lengths = np.array([len(c.tokens) for c in completions])
    ks = sorted({samples, *(2**i for i in range(samples.bit_length()) if 2**i <= samples)})
    return Scores(
        problems=len(groups),
        samples=samples,
        avg_at_k=float(right_PK.mean()),
        standard_error=clustered_standard_error(right_PK.mean(axis=1)),
        pass_at={k: float(pass_at_k(right_PK.sum(axis=1), samples, k).mean()) for k in ks},
        maj_at_k=float(np.mean([majority_at_k(a, r) for a, r in zip(answers, right_PK, strict=True)]))
        if votes
        else None,
        answered=float(np.mean([answer is not None for given in answers for answer in given])) if votes else None,
        length_mean=float(lengths.mean()),
        length_max=int(lengths.max()),
        truncated_fraction=float(np.mean([c.finish_reason == "length" for c in completions])),
    )


def problem_records(groups: Sequence[PromptGroup], *, votes: bool = True) -> list[dict[str, Any]]:
    """One JSON-able object a problem: prompt, reference answer, its own avg, pass and maj, and its responses: verdict,
    extracted answer, length in tokens, whether they were cut, text. Without `votes` maj and answers are null."""
    records = []
    for group in groups:
        answers = [final_answer(response) if votes else None for response in group.responses]
        right_K = np.asarray(group.accuracies, dtype=bool)
        records.append(
            {
                "id": group.prompt_id,
                "prompt": group.text,
                "answer": group.answer,
                "avg_at_k": float(right_K.mean()),
                "pass_at_k": float(right_K.any()),
                "maj_at_k": majority_at_k(answers, right_K) if votes else None,
                "responses": [
                    {
                        "right": bool(right),
                        "answer": answer,
                        "tokens": len(completion.tokens),
                        "truncated": completion.finish_reason == "length",
                        "text": text,
                    }
                    for right, answer, completion, text in zip(
                        right_K, answers, group.completions, group.responses, strict=True
                    )
                ],
            }
        )
    return records
