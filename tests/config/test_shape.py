"""What does not suit a rollout shape is refused with the value, the rule and the nearest value that works."""

import math

import pytest

from dapo_megatron.config import load_recipe
from dapo_megatron.config.shape import shape_problems
from dapo_megatron.errors import RequestError
from tests.command_line import RECIPE

CHAIN, TREE = "rollout.shape=chain", "rollout.shape=tree"
LEAVES = "rollout.samples_per_prompt=8"
BRANCHING = "rollout.tree.branching=[2, 2, 2]"
SHORT = "rollout.partition={kind: fixed, tokens: 10}"


def problems(*overrides: str) -> list[str]:
    return list(shape_problems(load_recipe(RECIPE, overrides)))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (CHAIN,),
        (CHAIN, "rollout.partition={kind: fixed, tokens: 47}", "rollout.chain.continuations=1"),
        (CHAIN, "algorithm.loss_aggregation=sequence-mean"),
        (CHAIN, "reward.grader=judge", "reward.judge.mode=binary"),
        (TREE, LEAVES, BRANCHING, SHORT, "reward.grader=judge", "reward.judge.normalise=z-score"),
        (TREE, LEAVES, BRANCHING, SHORT),
        (TREE, LEAVES, BRANCHING, "rollout.partition={cutpoints: 22, tokens: 23}", "rollout.tree.normalise=std"),
        (TREE, LEAVES, "rollout.tree.branching=[8]"),
        (TREE, LEAVES, "rollout.tree.branching=[1, 8]", SHORT, "algorithm.kl={coefficient: 0.1, place: loss}"),
    ],
)
def test_what_is_allowed(overrides):
    assert problems(*overrides) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (("rollout.tree.branching=[2, 4]",), ["rollout.tree is a setting of rollout.shape=tree", "leave it out"]),
        ((CHAIN, "rollout.tree.branching=[2, 4]"), ["rollout.tree", "with shape=chain leave it out"]),
        (("rollout.partition.cutpoints=2",), ["rollout.partition", "rollout.shape=chain and tree"]),
        (
            (CHAIN, "rollout.partition={kind: fixed, tokens: 48}"),
            ["rollout.partition.tokens=48", "rollout.max_response_length=48", "use 47 or less"],
        ),
        ((CHAIN, "rollout.partition.cutpoints=90"), ["rollout.partition.cutpoints=90", "use 47 or less"]),
        ((TREE, "rollout.samples_per_prompt=2", "rollout.tree.branching=[1, 1]", SHORT), ["[1, 1]", "use [1, 2]"]),
        (
            (TREE, "rollout.samples_per_prompt=4", "rollout.tree.branching=[2, 2, 1]", SHORT),
            ["[2, 2, 1]", "last level", "use [2, 2, 2]"],
        ),
        (
            (TREE, LEAVES, BRANCHING, "rollout.partition={cutpoints: 10, tokens: 10}"),
            ["rollout.partition.cutpoints=10", "rollout.partition.tokens=10", "cutpoints=9 or less, or kind=fixed"],
        ),
        ((TREE, LEAVES, BRANCHING, "rollout.partition={cutpoints: 1, tokens: 1}"), ["use kind=fixed"]),
        ((TREE, LEAVES, "rollout.tree.branching=[3, 3]", SHORT), ["rollout.samples_per_prompt=8", "9 leaves", "use 9"]),
        (
            (TREE, LEAVES, BRANCHING, "rollout.partition.tokens=24"),
            ["rollout.partition.tokens=24", "2 levels", "tokens=23 or less"],
        ),
        (
            (TREE, LEAVES, BRANCHING, "rollout.partition={kind: fixed, tokens: 1}", "rollout.max_response_length=2"),
            ["rollout.max_response_length=2", "branching of 2 levels or fewer"],
        ),
        ((CHAIN, "algorithm.advantage=group-mean"), ["algorithm.advantage=group-mean", CHAIN, "use group"]),
        ((CHAIN, "algorithm.kl={coefficient: 0.1, place: reward}"), ["algorithm.kl.place=reward", "use place=loss"]),
        (
            (CHAIN, "algorithm.policy_loss=gspo", "algorithm.loss_aggregation=sequence-mean"),
            ["algorithm.policy_loss=gspo", CHAIN, "use clip"],
        ),
        (
            (CHAIN, "reward.grader=judge", "reward.judge.normalise=z-score"),
            ["reward.judge.normalise=z-score", CHAIN, "two scales", "use none"],
        ),
        ((CHAIN, "reward.shuffle=true"), ["reward.shuffle=true", "use false"]),
        (
            (TREE, LEAVES, BRANCHING, SHORT, "algorithm.loss_aggregation=sequence-mean"),
            ["algorithm.loss_aggregation=sequence-mean", "use token-mean"],
        ),
    ],
)
def test_refusals(overrides, words):
    told = problems(*overrides)
    assert len(told) == 1, told
    assert all(word in told[0] for word in words), told


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("rollout.chain.continuations=0", "rollout.chain.continuations"),
        ("rollout.tree.branching=[]", "rollout.tree.branching"),
        ("rollout.tree.branching=[2, 0]", "rollout.tree.branching"),
        ("rollout.partition.tokens=0", "rollout.partition.tokens"),
        ("rollout.shape=graph", "rollout.shape"),
    ],
)
def test_values_out_of_bounds_are_refused_when_the_recipe_is_read(override, word):
    with pytest.raises(RequestError, match=word):
        load_recipe(RECIPE, [override])


def test_the_published_tree_is_allowed_where_its_leaves_are_named():
    branching = [6, 6, 6]
    told = problems(TREE, "rollout.max_response_length=4096", "rollout.partition={kind: fixed, tokens: 600}")
    assert len(told) == 1 and f"use {math.prod(branching)}" in told[0]
