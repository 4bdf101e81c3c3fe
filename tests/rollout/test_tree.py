"""Trees by a scripted engine: the requests of each level, brute-force values, and who owns a token."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.config.rollout import Partition, Rollout
from dapo_megatron.config.rollout import Tree as TreeSettings
from dapo_megatron.data.completions import PromptGroup
from dapo_megatron.rollout.engine import sample_seed
from dapo_megatron.rollout.tree import Tree, draw_trees, responses_of, value_tree
from tests.rollout.scripted import ScriptedEngine, reward_of

LONGEST, KEY = 14, (7, 6, 2, 0)
PROMPTS = [np.array([20, 30], np.int32), np.array([21], np.int32)]
FIXED = Partition(kind="fixed", tokens=4)


def rollout(branching: list[int], partition: Partition = FIXED, normalise: str = "none") -> Rollout:
    return Rollout(
        shape="tree", tree=TreeSettings(branching=branching, normalise=normalise), partition=partition,
        max_response_length=LONGEST, temperature=0.8,
    )  # fmt: skip


def draw(settings: Rollout, stop: float = 0.15, key: tuple[int, ...] = KEY) -> tuple[list[Tree], ScriptedEngine]:
    engine = ScriptedEngine(stop=stop)
    return draw_trees(PROMPTS, settings, generate=engine.generate, seed_key=key), engine


def valued(tree: Tree, settings: Rollout, *, filtering: bool = False) -> tuple[PromptGroup, list]:
    rows, completions = responses_of(tree, overlong_filtering=filtering)
    rewards = np.array([reward_of(c.tokens) for c in completions], np.float32)
    group = PromptGroup(0, "", "", tree.prompt_tokens, completions, accuracies=rewards > 0, rewards=rewards)
    value_tree(group, tree, rows, settings, epsilon=1e-3)
    return group, rows


def test_a_level_is_one_wave_that_continues_every_node():
    settings = rollout([2, 3, 2])
    trees, engine = draw(settings)
    assert engine.together == [2, 3, 2]
    for level, wave in enumerate(engine.waves):
        expected = []
        for i, tree in enumerate(trees):
            parents = [n for n, path in enumerate(tree.paths) if len(path) == level] if level else [-1]
            for parent in parents:
                if level and tree.segments[parent].finish_reason == "stop":
                    continue
                path, before = (tree.paths[parent], tree.text_of(parent).tolist()) if level else ((), [])
                most = LONGEST - len(before) if level == 2 else 4
                for k in range((2, 3, 2)[level]):
                    seed = sample_seed(*KEY, i, level, *path, k)
                    expected.append((PROMPTS[i].tolist() + before, seed, most))
        assert [(r.prompt_tokens.tolist(), r.seed, r.max_new_tokens) for r in wave] == expected
        assert {(r.temperature, r.top_p) for r in wave} == {(0.8, 1.0)}
    ends = [
        s.finish_reason for tree in trees for s, path in zip(tree.segments, tree.paths, strict=True) if len(path) < 3
    ]
    assert "stop" in ends and "length" in ends, "some nodes end early, others go on"
    seeds = [r.seed for wave in engine.waves for r in wave]
    assert len(set(seeds)) == len(seeds)


def brute_force_value(rows_and_rewards: list[tuple[tuple[int, ...], float]], path: tuple[int, ...]) -> float:
    """Mean over the children of `path` of their values, from the leaves' paths alone."""
    for leaf, reward in rows_and_rewards:
        if leaf == path:
            return reward
    below = sorted({leaf[: len(path) + 1] for leaf, _ in rows_and_rewards if leaf[: len(path)] == path})
    return sum(brute_force_value(rows_and_rewards, child) for child in below) / len(below)


@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(0, 999), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_rows_values_and_owners_of_random_trees(branching, seed, cutpoints, normalised):
    partition = Partition(kind="cutpoint", cutpoints=1, tokens=4) if cutpoints else FIXED
    chosen = rollout(branching, partition, "std" if normalised else "none")
    trees, engine = draw(chosen, key=(seed, 6, 0, 0))
    for i, tree in enumerate(trees):
        group, rows = valued(tree, chosen)
        leaves = [(tree.paths[row.nodes[-1]], float(reward_of(tree.text_of(row.nodes[-1])))) for row in rows]
        assert [leaf for leaf, _ in leaves] == sorted(leaf for leaf, _ in leaves)
        owners: dict[int, int] = {}
        for row, completion, advantages, weights in zip(
            rows, group.completions, group.advantages, group.weights, strict=True
        ):
            assert completion.tokens.tolist() == tree.text_of(row.nodes[-1]).tolist()
            assert len(completion.tokens) <= LONGEST
            columns = (completion.logprobs, completion.policy_versions, advantages, weights)
            assert {len(values) for values in columns} == {len(completion.tokens)}
            start = 0
            for node in row.nodes:
                stop = start + len(tree.segments[node].tokens)
                assert completion.logprobs[start:stop].tolist() == tree.segments[node].logprobs.tolist()
                path = tree.paths[node]
                expected = brute_force_value(leaves, path) - brute_force_value(leaves, path[:-1])
                if normalised and expected:
                    siblings = {p[: len(path)] for p, _ in leaves if p[: len(path) - 1] == path[:-1]}
                    expected /= np.std([brute_force_value(leaves, p) for p in siblings], ddof=1) + 1e-3
                assert advantages[start:stop].tolist() == pytest.approx([expected] * (stop - start), abs=1e-6)
                worth = set(weights[start:stop].tolist())
                assert worth in ({0.0}, {1.0})
                owners[node] = owners.get(node, 0) + int(worth == {1.0})
                assert abs(expected) > 1e-9 or worth == {0.0}, "no advantage, no weight"
                start = stop
            assert start == len(completion.tokens)
        assert len(owners) == len(tree.segments)
        dropped = [node for node, times in owners.items() if times == 0]
        assert set(owners.values()) <= {0, 1}, "a token is trained in more than one row"
        sizes = [len(s.tokens) for s in tree.segments]
        counts = group.counts
        assert (counts.segments, counts.dropped) == (len(sizes), len(dropped))
        assert counts.repeated == sum(len(c.tokens) for c in group.completions) - sum(sizes)
        mine = [r for wave in engine.waves for r in wave if r.prompt_tokens[0] == PROMPTS[i][0]]
        assert counts.generated == sum(len(engine.answer(r).tokens) for r in mine) >= sum(sizes)


def test_a_cutpoint_ends_a_segment_and_what_is_behind_is_drawn_anew():
    trees, _ = draw(rollout([3, 3], Partition(kind="cutpoint", cutpoints=2, tokens=12)))
    first = [s for tree in trees for s, path in zip(tree.segments, tree.paths, strict=True) if len(path) == 1]
    for segment in first:
        cutpoints = int((np.exp(segment.logprobs) < 0.9).sum())
        assert cutpoints < 2 or (cutpoints == 2 and segment.logprobs[-1] < -0.1)
    assert any(tree.drawn > sum(len(s.tokens) for s in tree.segments) for tree in trees)


def _weighted(tree: Tree, nodes: list[int], weights: np.ndarray) -> list[int]:
    """Of a row's nodes, those whose tokens have a weight."""
    ends = np.cumsum([len(tree.segments[n].tokens) for n in nodes])
    return [n for n, end in zip(nodes, ends, strict=True) if weights[end - 1]]


def test_a_filtered_row_leaves_its_shared_segments_to_another():
    chosen = rollout([2, 3])
    moved = 0
    for tree in [tree for step in range(8) for tree in draw(chosen, stop=0.08, key=(7, 6, step, 0))[0]]:
        group, rows = valued(tree, chosen, filtering=True)
        _, plain = valued(tree, chosen)
        for row, before, completion, weights in zip(rows, plain, group.completions, group.weights, strict=True):
            if completion.finish_reason == "length":
                assert not any(row.owned) and not weights.any()
            elif row.owned != before.owned:
                moved += 1
        with_a_trained_leaf = {
            n for r, c in zip(rows, group.completions, strict=True) for n in r.nodes if c.finish_reason == "stop"
        }
        owned = [n for row in rows for n, mine in zip(row.nodes, row.owned, strict=True) if mine]
        assert sorted(owned) == sorted(with_a_trained_leaf)
        assert group.counts.segments == len(owned), "segments of filtered responses alone are not valued"
        weighted = {n for r, w in zip(rows, group.weights, strict=True) for n in _weighted(tree, r.nodes, w)}
        assert group.counts.dropped == len(set(owned) - weighted)
    assert moved, "no row took over a shared segment: the case was not tried"
