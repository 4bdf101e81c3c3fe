"""Run on two ranks: references that follow a policy, in both places."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from dapo_megatron.config.algorithm import Algorithm, Reference
from dapo_megatron.data.completions import PromptGroup
from dapo_megatron.learner.learner import Learner
from dapo_megatron.learner.reference import ReferenceWeights
from dapo_megatron.policy_step import score_old_policy
from tests.learner.layouts import build

SLOW = Reference(kind="ema", decay=0.999)
MOVES = 20
FACTORS = (("norm", 3.0), ("embed", 0.5), ("output_layer", 0.5))  # copies of one weight change alike
OTHERS = 1.01


def moving(model: str, groups: Callable[[int], list[PromptGroup]]) -> dict:
    """See the keys of the answer; `groups`: fresh ones of a seed."""
    learner = build(model, "tp2pp1", dtype=torch.bfloat16)
    beside = build(model, "tp2pp1", beside=True, dtype=torch.bfloat16)
    found = {"bf16": _followed_slowly(learner), "periodic": _periodic(learner)}
    found["bf16 resident"] = _gap_of_placements(learner, beside, groups(1))
    found["moved"] = {"expected": _expected_change(Path(model))}
    for layout in ("tp2pp1", "tp1pp2"):
        learner = build(model, layout, temperature=0.9)
        reference = ReferenceWeights(learner, Reference(kind="ema", decay=0.9))
        for key, weight in learner.weights.items():
            weight.mul_(_factor(key))
        found["moved"][layout] = reference.move(1)
    beside = build(model, "tp1pp2", beside=True, dtype=torch.bfloat16, temperature=0.9)
    found["fp32 resident"] = _gap_of_placements(learner, beside, groups(1))
    found |= _scored_anew(learner, reference, groups)
    return found


def _followed_slowly(learner: Learner) -> dict:
    """Largest gap to an average in fp64, beside that of an average that is itself bf16, as shares of the way gone."""
    reference = ReferenceWeights(learner, SLOW)
    start = {key: weight.double() for key, weight in learner.weights.items()}
    exact, naive = dict(start), {key: weight.clone() for key, weight in learner.weights.items()}
    for step in range(MOVES):
        for key, weight in learner.weights.items():
            weight.mul_(1.02)
            exact[key] = exact[key] * SLOW.decay + weight.double() * (1 - SLOW.decay)
            naive[key].lerp_(weight, 1 - SLOW.decay)
        reference.move(step + 1)
    way = _norm(exact, start)
    with reference.in_place() as model:
        rounded = all(torch.equal(model.weights[key], reference.values[key].bfloat16()) for key in start)
    return {
        "fp32 sums": _norm(reference.values, exact) / way,
        "bf16 sums": _norm(naive, exact) / way,
        "scores with the rounded sums": rounded,
    }


def _periodic(learner: Learner) -> dict:
    """Of a move after step 1, and after step 2."""
    reference = ReferenceWeights(learner, Reference(kind="periodic", every=2))
    start = {key: values.clone() for key, values in reference.values.items()}
    for weight in learner.weights.values():
        weight.mul_(1.5)
    between = reference.move(1)
    stayed = all(torch.equal(values, start[key]) for key, values in reference.values.items())
    return {
        "between": between,
        "stayed": stayed,
        "moved": reference.move(2),
        "is the policy": all(torch.equal(reference.values[key], weight) for key, weight in learner.weights.items()),
    }


def _gap_of_placements(learner: Learner, beside: Learner, scored: list[PromptGroup]) -> dict[str, float]:
    """Between log-probs of a reference on the host and of a resident one, after the same moves; and what the policy's
    own differ from the reference's."""
    follows = Reference(kind="ema", decay=0.5)
    host, resident = ReferenceWeights(learner, follows), ReferenceWeights(learner, follows, resident=beside)
    for weight in learner.weights.values():
        weight.mul_(1.1)
    host.move(1)
    resident.move(1)
    policy = {key: weight.clone() for key, weight in learner.weights.items()}
    found = []
    for reference in (host, resident):
        score_old_policy(learner, scored, Algorithm(), reference=reference)
        found.append(_reference_scores(scored))
    old = np.concatenate([values for group in scored for values in group.old_logprobs])
    assert all(torch.equal(weight, policy[key]) for key, weight in learner.weights.items())
    gap = np.abs(found[0] - found[1])
    return {
        "largest": float(gap.max()),
        "mean": float(gap.mean()),
        "size": float(np.abs(found[0]).mean()),
        "policy": float(np.abs(old - found[0]).mean()),
    }


def _scored_anew(learner: Learner, reference: ReferenceWeights, groups: Callable[[int], list[PromptGroup]]) -> dict:
    """How far the log-probs of one group go with the reference, and which groups kept for later have any."""
    trained, kept = groups(1), groups(2)
    score_old_policy(learner, trained, Algorithm(), kept=kept, reference=reference)
    first, early = _reference_scores(trained), [len(group.reference_logprobs) for group in kept]
    reference.move(2)
    score_old_policy(learner, trained, Algorithm(), reference=reference)
    return {"scored anew": float(np.abs(_reference_scores(trained) - first).max()), "kept have": early}


def _reference_scores(of: list[PromptGroup]) -> np.ndarray:
    return np.concatenate([values for group in of for values in group.reference_logprobs])


def _expected_change(model: Path) -> float:
    """‖change‖ / ‖weights‖ of the whole model, each of its tensors once, from its files."""
    tensors = load_file(model / "model.safetensors")
    change = sum(
        float(tensor.double().mul(0.1 * (_factor(name) - 1)).square().sum()) for name, tensor in tensors.items()
    )
    return (change / sum(float(tensor.double().square().sum()) for tensor in tensors.values())) ** 0.5


def _factor(key: str) -> float:
    return next((factor for word, factor in FACTORS if word in key), OTHERS)


def _norm(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return float(sum((a[key].double() - b[key].double()).square().sum() for key in b)) ** 0.5
