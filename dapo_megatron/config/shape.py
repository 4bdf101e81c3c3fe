"""Rules of `rollout.shape`: which settings go with responses that are cut into segments."""

import math
from collections.abc import Iterator

from dapo_megatron.config.algorithm import Algorithm
from dapo_megatron.config.recipe import Recipe
from dapo_megatron.config.rollout import Rollout

SHAPES = {
    "independent": "responses drawn each by itself; algorithm.advantage looks at their rewards",
    "chain": "each is cut into segments, valued by continuing its prefixes (SPO-chain)",
    "tree": "they branch, segments are valued from the leaves up (SPO-tree)",
    "preferences": "pairs of a file, nothing is drawn for training (DPO)",
}
SEGMENTED = ("chain", "tree")  # of these, whose responses are cut into segments
WHOLE = ("gspo", "dpo")  # policy losses with one ratio, or one margin, a response
READ_BY = {"partition": SEGMENTED, "chain": ("chain",), "tree": ("tree",)}


def shape_problems(recipe: Recipe) -> Iterator[str]:
    """What does not suit `rollout.shape`, a line each."""
    yield from _unread(recipe.rollout)
    if recipe.rollout.shape not in SEGMENTED:
        return
    yield from _tree(recipe.rollout) if recipe.rollout.shape == "tree" else _chain(recipe.rollout)
    yield from _advantages(recipe)


def _unread(rollout: Rollout) -> Iterator[str]:
    changed = rollout.changed()
    for name, shapes in READ_BY.items():
        if rollout.shape not in shapes and name in changed:
            of = " and ".join(shapes)
            yield f"rollout.{name} is a setting of rollout.shape={of}; with shape={rollout.shape} leave it out"


def _chain(rollout: Rollout) -> Iterator[str]:
    name = "tokens" if rollout.partition.kind == "fixed" else "cutpoints"
    value, longest = getattr(rollout.partition, name), rollout.max_response_length
    if value >= longest:
        yield (
            f"rollout.partition.{name}={value} would cut no response: a segment must be shorter than "
            f"rollout.max_response_length={longest}; use {max(1, longest - 1)} or less"
        )


def _tree(rollout: Rollout) -> Iterator[str]:
    branching, tokens, longest = rollout.tree.branching, rollout.partition.tokens, rollout.max_response_length
    leaves, cuts = math.prod(branching), len(branching) - 1
    if leaves == 1:
        nearest = [*branching[:-1], 2]
        yield f"rollout.tree.branching={branching} branches nowhere: every advantage would be 0; use {nearest}"
    elif branching[-1] == 1:
        yield (
            f"rollout.tree.branching={branching} branches nowhere on its last level, whose advantages would be 0; "
            f"use {[*branching[:-1], 2]}"
        )
    elif rollout.samples_per_prompt != leaves:
        yield (
            f"rollout.samples_per_prompt={rollout.samples_per_prompt} is not the {leaves} leaves of "
            f"rollout.tree.branching={branching}; use {leaves}"
        )
    partition = rollout.partition
    if cuts and partition.kind == "cutpoint" and partition.cutpoints >= tokens:
        nearest = f"cutpoints={tokens - 1} or less, or kind=fixed" if tokens > 1 else "kind=fixed"
        yield (
            f"rollout.partition.cutpoints={partition.cutpoints} never ends a segment before its "
            f"rollout.partition.tokens={tokens} do; use {nearest}"
        )
    if cuts * tokens >= longest:
        told = (
            f"rollout.partition.tokens={tokens} on {cuts} levels of rollout.tree.branching={branching} leaves the last"
        )
        if longest > cuts:
            nearest = f"rollout.partition.tokens={(longest - 1) // cuts} or less"
        else:
            nearest = f"a branching of {longest} levels or fewer"
        yield f"{told} level nothing of rollout.max_response_length={longest}; use {nearest}"


def _advantages(recipe: Recipe) -> Iterator[str]:
    algorithm, shape = recipe.algorithm, recipe.rollout.shape
    default = Algorithm.model_fields["advantage"].default
    if algorithm.advantage != default:
        yield (
            f"algorithm.advantage={algorithm.advantage} would not act: rollout.shape={shape} takes advantages from the "
            f"values of segments; use {default}, or rollout.shape=independent"
        )
    if algorithm.kl.coefficient > 0 and algorithm.kl.place == "reward":
        yield (
            f"algorithm.kl.place=reward would not act: rollout.shape={shape} values segments before there are "
            "log-probs of the reference; use place=loss"
        )
    if algorithm.policy_loss in WHOLE:
        yield (
            f"algorithm.policy_loss={algorithm.policy_loss} takes a response as a whole, and rollout.shape={shape} "
            "values its segments apart; use clip, or rollout.shape=independent"
        )
    judge = recipe.reward.judge
    if shape == "chain" and recipe.reward.method == "judge" and judge.normalise != "none":
        yield (
            f"reward.judge.normalise={judge.normalise} puts responses and the continuations of rollout.shape=chain, "
            "which are graded apart, on two scales; use none"
        )
    if recipe.reward.shuffle:
        yield f"reward.shuffle=true mixes rewards after rollout.shape={shape} has used them; use false"
    if shape == "tree" and algorithm.loss_aggregation == "sequence-mean":
        yield (
            "algorithm.loss_aggregation=sequence-mean would weigh a segment by the row it happens to stand in: "
            "responses of rollout.shape=tree share segments; use token-mean"
        )
