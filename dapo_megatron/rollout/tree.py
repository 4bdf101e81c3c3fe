"""SPO's tree (arXiv 2505.23564): responses to a prompt that branch, level by level, valued from the leaves up.

Every node is a segment. All nodes of a level are drawn in one wave; those of the last level run to their end, and one
that ends earlier is a leaf too.

    V(leaf) = its response's reward          V(node) = mean of its children          A = V(node) − V(parent)

Rows are the leaves' whole paths. A segment that several share has weight 1 in the first of these rows that is trained,
0 in the others; a segment of advantage 0 has weight 0.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dapo_megatron.algorithms.segments import ROOT, TreeRow, tree_advantages, tree_rows, tree_values
from dapo_megatron.config.rollout import Rollout
from dapo_megatron.data.completions import Completion, PromptGroup, SegmentCounts
from dapo_megatron.rollout.chain import Generate, boundaries
from dapo_megatron.rollout.engine import RolloutRequest, sample_seed

EMPTY = np.zeros(0, np.int32)


@dataclass
class Tree:
    """The nodes of a prompt's tree, parents before children; `drawn`: tokens the engine drew for it.

    segments: each node's own tokens, as the completion that they came in. paths: which child of which child a node is.
    """

    prompt_tokens: np.ndarray
    parents: list[int] = field(default_factory=list)
    paths: list[tuple[int, ...]] = field(default_factory=list)
    segments: list[Completion] = field(default_factory=list)
    drawn: int = 0

    def nodes_to(self, node: int) -> list[int]:
        """From the first level down to `node`."""
        nodes = []
        while node != ROOT:
            nodes.append(node)
            node = self.parents[node]
        return nodes[::-1]

    def text_of(self, node: int) -> np.ndarray:
        """The response so far: tokens from the first level down to the end of `node`."""
        return np.concatenate([EMPTY, *(self.segments[n].tokens for n in self.nodes_to(node))])


def draw_trees(
    prompts: Sequence[np.ndarray], rollout: Rollout, *, generate: Generate, seed_key: tuple[int, ...]
) -> list[Tree]:
    """One tree a prompt. Child k of the node whose path is p_1 … p_d in the i-th tree has the seed
    (seed_key, i, d, p_1, …, p_d, k)."""
    trees = [Tree(tokens) for tokens in prompts]
    live = [[ROOT] for _ in trees]
    for level, count in enumerate(rollout.tree.branching):
        last = level == len(rollout.tree.branching) - 1
        places = [(i, parent, k) for i, parents in enumerate(live) for parent in parents for k in range(count)]
        requests = [
            _request(n, trees[i], i, parent, k, rollout, seed_key, last=last) for n, (i, parent, k) in enumerate(places)
        ]
        live = [[] for _ in trees]
        for (i, parent, k), drawn in zip(places, generate(requests, count) if requests else [], strict=True):
            tree = trees[i]
            segment = drawn if last else _first_segment(drawn, rollout)
            tree.parents.append(parent)
            tree.paths.append((*(tree.paths[parent] if parent != ROOT else ()), k))
            tree.segments.append(segment)
            tree.drawn += len(drawn.tokens)
            if segment.finish_reason == "length":
                live[i].append(len(tree.parents) - 1)
    return trees


def _request(
    ticket: int,
    tree: Tree,
    number: int,
    parent: int,
    child: int,
    rollout: Rollout,
    seed_key: tuple[int, ...],
    *,
    last: bool,
) -> RolloutRequest:
    path = tree.paths[parent] if parent != ROOT else ()
    before = tree.text_of(parent)
    left = rollout.max_response_length - len(before)
    return RolloutRequest(
        ticket=ticket,
        prompt_tokens=np.concatenate([tree.prompt_tokens, before]),
        seed=sample_seed(*seed_key, number, len(path), *path, child),
        max_new_tokens=left if last else min(left, rollout.partition.tokens),
        temperature=rollout.temperature,
        top_p=rollout.top_p,
    )


def _first_segment(drawn: Completion, rollout: Rollout) -> Completion:
    """What is drawn up to the first boundary inside it: what stands behind is thrown away, and the node goes on."""
    inner = boundaries(drawn.logprobs, rollout.partition)
    if len(inner) == 0:
        return drawn
    stop = int(inner[0])
    return Completion(drawn.ticket, drawn.tokens[:stop], drawn.logprobs[:stop], "length", drawn.policy_versions[:stop])


def responses_of(tree: Tree, *, overlong_filtering: bool) -> tuple[list[TreeRow], list[Completion]]:
    """The rows of a tree, one a leaf, and each row's whole response. A truncated response that is filtered owns no
    segment: another row that shares it and is trained does."""
    filtered = [overlong_filtering and segment.finish_reason == "length" for segment in tree.segments]
    rows = tree_rows(np.array(tree.parents), untrained=np.array(filtered))
    return rows, [_joined(n, [tree.segments[node] for node in row.nodes]) for n, row in enumerate(rows)]


def _joined(ticket: int, segments: Sequence[Completion]) -> Completion:
    columns = (np.concatenate([getattr(s, name) for s in segments]) for name in ("tokens", "logprobs"))
    versions = np.concatenate([s.policy_versions for s in segments])
    return Completion(ticket, *columns, segments[-1].finish_reason, versions)


def value_tree(group: PromptGroup, tree: Tree, rows: Sequence[TreeRow], rollout: Rollout, *, epsilon: float) -> None:
    """Leave advantages, weights and counts in the tree's group, which is graded and in the order of `rows`."""
    parents, rewards = np.array(tree.parents), np.zeros(len(tree.parents))
    for row, reward in zip(rows, group.rewards.tolist(), strict=True):
        rewards[row.nodes[-1]] = reward
    advantages = tree_advantages(
        parents, tree_values(parents, rewards), normalise=rollout.tree.normalise, epsilon=epsilon
    )
    sizes = np.array([len(s.tokens) for s in tree.segments])

    def on_tokens(numbers: Callable[[TreeRow], np.ndarray]) -> list[np.ndarray]:
        return [np.repeat(numbers(row).astype(np.float32), sizes[row.nodes]) for row in rows]

    group.advantages = on_tokens(lambda row: advantages[row.nodes])
    group.weights = on_tokens(lambda row: np.array(row.owned) & (advantages[row.nodes] != 0))
    owned = [node for row in rows for node, mine in zip(row.nodes, row.owned, strict=True) if mine]
    group.counts = SegmentCounts(
        segments=len(owned),
        dropped=int((advantages[owned] == 0).sum()),
        continuations=0,
        generated=tree.drawn,
        repeated=sum(int(sizes[row.nodes].sum()) for row in rows) - int(sizes.sum()),
    )
