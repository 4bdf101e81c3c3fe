"""SPO's partition, values and advantages against what their definitions say, number by number."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.algorithms.segments import (
    ROOT,
    chain_advantages,
    cutpoint_boundaries,
    fixed_boundaries,
    of_tokens,
    tree_advantages,
    tree_rows,
    tree_values,
)
from dapo_megatron.errors import RunError

PROBABILITIES = st.lists(st.sampled_from([0.1, 0.5, 0.89, 0.91, 1.0]), max_size=40)


@given(PROBABILITIES, st.integers(1, 6), st.sampled_from([0.9, 0.3, 1.0]))
@settings(deadline=None)
def test_a_boundary_stands_behind_every_kth_cutpoint(probabilities, every, threshold):
    expected, cutpoints = [], 0
    for position, probability in enumerate(probabilities):
        if probability < threshold:
            cutpoints += 1
            if cutpoints % every == 0 and position + 1 < len(probabilities):
                expected.append(position + 1)
    logprobs = np.log(np.array(probabilities, np.float32))
    assert cutpoint_boundaries(logprobs, threshold=threshold, every=every).tolist() == expected


@given(st.integers(0, 50), st.integers(1, 12))
@settings(deadline=None)
def test_fixed_segments_are_full_but_the_last(length, tokens):
    edges = [0, *fixed_boundaries(length, tokens=tokens).tolist(), length]
    sizes = [b - a for a, b in pairwise(edges)]
    assert all(size == tokens for size in sizes[:-1]) and (length == 0 or 0 < sizes[-1] <= tokens)


@given(st.lists(st.lists(st.sampled_from([-1.0, 0.25, 1.0]), min_size=9, max_size=9), max_size=6), st.integers(1, 6))
@settings(deadline=None)
def test_chain_advantages_are_differences_of_means_and_telescope(continuations, group):
    start = np.mean([1.0] + [-1.0] * (group - 1))
    values = [start, *(np.mean(rewards) for rewards in continuations), 1.0]
    found = chain_advantages(values)
    exact = [Fraction(2 - group, group), *(sum(map(Fraction, r)) / 9 for r in continuations), Fraction(1)]
    assert found.tolist() == pytest.approx([float(b - a) for a, b in pairwise(exact)], abs=1e-12)
    assert math.fsum(found) == pytest.approx(1.0 - start, abs=1e-8)
    assert [a == 0 for a in found] == [a == b for a, b in pairwise(exact)]


def test_every_token_has_its_segments_number():
    found = of_tokens(np.array([0.5, -1.0, 0.0]), np.array([2, 3]), 6)
    assert found.dtype == np.float32 and found.tolist() == [0.5, 0.5, -1, 0, 0, 0]
    assert of_tokens(np.array([2.0]), np.array([], np.int64), 3).tolist() == [2, 2, 2]


@st.composite
def trees(draw) -> tuple[np.ndarray, np.ndarray]:
    """(parents, rewards): level after level each live node has as many children; a child may end early."""
    branching = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    parents, live = [], [ROOT]
    for count in branching:
        level = [(len(parents) + i, parent) for i, parent in enumerate(p for p in live for _ in range(count))]
        parents += [parent for _, parent in level]
        live = [node for node, _ in level if draw(st.booleans())]
    rewards = [draw(st.sampled_from([-1.0, 0.3, 1.0])) for _ in parents]
    return np.array(parents), np.array(rewards, np.float32)


def children_of(parents: np.ndarray, node: int) -> list[int]:
    return [child for child, parent in enumerate(parents.tolist()) if parent == node]


def brute_force_value(parents: np.ndarray, rewards: np.ndarray, node: int) -> Fraction:
    below = children_of(parents, node)
    if not below:
        return Fraction(float(rewards[node]))
    return sum(brute_force_value(parents, rewards, child) for child in below) / len(below)


@given(trees(), st.sampled_from(["none", "std"]))
@settings(deadline=None)
def test_a_trees_values_and_advantages_are_those_of_brute_force(tree, normalise):
    parents, rewards = tree
    values = tree_values(parents, rewards)
    exact = [brute_force_value(parents, rewards, node) for node in range(len(parents))]
    assert values.tolist() == pytest.approx([float(v) for v in exact], rel=1e-12, abs=1e-12)
    found = tree_advantages(parents, values, normalise=normalise, epsilon=1e-3)
    for node, parent in enumerate(parents.tolist()):
        siblings = [float(exact[child]) for child in children_of(parents, parent)]
        expected = float(exact[node] - brute_force_value(parents, rewards, parent))
        if normalise == "std" and len({exact[c] for c in children_of(parents, parent)}) > 1:
            expected /= np.std(siblings, ddof=1) + 1e-3
        assert found[node] == pytest.approx(expected, rel=1e-9, abs=1e-12)
        if expected == 0:
            assert found[node] == 0.0, "rounding must not pass for an advantage"


@given(trees())
@settings(deadline=None)
def test_every_node_is_owned_by_exactly_one_row_of_its_leaves(tree):
    parents, _ = tree
    rows = tree_rows(parents)
    leaves = [node for node in range(len(parents)) if not children_of(parents, node)]
    assert sorted(row.nodes[-1] for row in rows) == leaves
    for row in rows:
        assert parents[row.nodes].tolist() == [ROOT, *row.nodes[:-1]]
        assert row.owned[-1], "a leaf's own tokens are its row's"
    owned = [node for row in rows for node, mine in zip(row.nodes, row.owned, strict=True) if mine]
    assert sorted(owned) == list(range(len(parents)))


def test_rewards_must_be_finite():
    with pytest.raises(RunError, match="reward is nan"):
        chain_advantages([0.0, math.nan, 1.0])
    with pytest.raises(RunError, match="reward is inf"):
        tree_values(np.array([ROOT, 0]), np.array([0.0, math.inf]))
    assert tree_values(np.array([ROOT, 0]), np.array([math.nan, 1.0])).tolist() == [1, 1], "no leaf's reward"
