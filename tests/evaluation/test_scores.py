import json

import numpy as np
import pytest

from dapo_megatron.config.load import build_recipe
from dapo_megatron.data.completions import Completion, PromptGroup
from dapo_megatron.evaluation import evaluate, problem_records, score


def group(row, texts, right, lengths, cut=()):
    return PromptGroup(
        prompt_id=row,
        text=f"question {row}",
        answer="7",
        prompt_tokens=np.arange(3, dtype=np.int32),
        completions=[
            Completion(j, np.zeros(n, np.int32), np.zeros(n, np.float32), "length" if j in cut else "stop", np.zeros(n))
            for j, n in enumerate(lengths)
        ],
        responses=texts,
        accuracies=np.array(right, bool),
        rewards=np.where(right, 1, -1).astype(np.float32),
    )


GROUPS = [
    group(0, ["Answer: 7", "so Answer: 07.", "Answer: 8", "no idea"], [1, 1, 0, 0], [1, 2, 3, 10], cut=(3,)),
    group(1, ["Answer: 1"] * 4, [0] * 4, [4] * 4),
]


def test_scores():
    scores = score(GROUPS)
    assert (scores.problems, scores.samples, scores.length_max) == (2, 4, 10)
    assert scores.avg_at_k == 0.25
    assert scores.pass_at == {1: 0.25, 2: pytest.approx((1 - 1 / 6) / 2), 4: 0.5}
    assert scores.pass_at_k == 0.5
    assert scores.maj_at_k == 0.5  # "7" and "07." are one answer
    assert scores.standard_error == pytest.approx(np.std([0.5, 0], ddof=1) / np.sqrt(2))
    assert scores.answered == 7 / 8
    assert scores.length_mean == 4.0
    assert scores.truncated_fraction == 1 / 8


def test_pass_is_told_at_powers_of_two_and_at_k():
    three = [group(0, ["Answer: 7"] * 3, [1, 0, 0], [1, 1, 1])]
    assert score(three).pass_at == {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3), 3: 1.0}


def test_records_hold_what_was_said_and_decided():
    first = json.loads(json.dumps(problem_records(GROUPS)))[0]
    assert (first["prompt"], first["answer"], first["id"]) == ("question 0", "7", 0)
    assert (first["avg_at_k"], first["pass_at_k"], first["maj_at_k"]) == (0.5, 1.0, 1.0)
    assert [r["answer"] for r in first["responses"]] == ["7", "7", "8", None]
    assert [r["right"] for r in first["responses"]] == [True, True, False, False]
    assert [r["tokens"] for r in first["responses"]] == [1, 2, 3, 10]
    assert [r["truncated"] for r in first["responses"]] == [False, False, False, True]


def test_without_final_answers_there_is_no_majority():
    scores = score(GROUPS, votes=False)
    assert (scores.maj_at_k, scores.answered) == (None, None)
    assert scores.avg_at_k == score(GROUPS).avg_at_k and scores.pass_at == score(GROUPS).pass_at
    first = problem_records(GROUPS, votes=False)[0]
    assert first["maj_at_k"] is None and {r["answer"] for r in first["responses"]} == {None}
    recipe = {
        "run": {"directory": "r", "steps": 1},
        "model": {"path": "m"},
        "evaluation": {"samples": 4, "max_prompts": 2},
    }
    for grader, there in (("rule", True), ("code", False), ("model", False)):
        metrics, _ = evaluate(Sampler(), build_recipe(recipe | {"reward": {"grader": grader}}))
        assert ("validation/majority" in metrics) is there


class Sampler:
    """Stands in for a GroupSampler and remembers what it was asked for."""

    def __init__(self):
        self.prompts, self.asked = [None, None, None], []

    def draw(self, rows, *, samples, temperature, top_p, seed_key, fork=None):
        assert fork is None  # no recipe here asks for a second temperature
        self.asked.append((list(rows), samples, temperature, top_p, seed_key))
        return [GROUPS[row] if samples > 1 else group(row, ["Answer: 7"], [1], [1]) for row in rows]


def test_training_evaluates_with_the_same_scores():
    settings = {"samples": 4, "temperature": 0.5, "top_p": 0.9, "max_prompts": 2, "seed": 5}
    recipe = build_recipe({"run": {"directory": "r", "steps": 1}, "model": {"path": "m"}, "evaluation": settings})
    sampler = Sampler()
    metrics, groups = evaluate(sampler, recipe)
    assert groups == GROUPS
    assert sampler.asked == [([0, 1], 4, 0.5, 0.9, (5, 3)), ([0, 1], 1, 0.0, 1.0, (5, 4))]
    scores = score(GROUPS)
    assert metrics == {
        "validation/accuracy": scores.avg_at_k,
        "validation/pass": scores.pass_at_k,
        "validation/majority": scores.maj_at_k,
        "validation/standard_error": scores.standard_error,
        "validation/response_length": scores.length_mean,
        "validation/truncated_fraction": scores.truncated_fraction,
        "validation/accuracy_greedy": 1.0,
    }
