"""Segment Policy Optimization (SPO, arXiv 2505.23564): where a response is cut, and what each piece is worth.

A segment's advantage is the value behind it less the value before it. Chain: values of the prefixes of one response,
estimated by continuing them. Tree: values of the nodes of a tree of segments, from its leaves up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dapo_megatron.errors import RunError

ROUNDING = 1e-9  # units of reward: means of equal fp32 rewards differ by less, unequal ones by more
ROOT = -1

Normalise = Literal["none", "std"]


def cutpoint_boundaries(logprobs_L: np.ndarray, *, threshold: float, every: int) -> np.ndarray:
    """Boundaries behind every `every`-th cutpoint, a token with p < threshold under the policy that drew it.

    Args:
        logprobs_L: nats, of the drawn tokens.

    Returns:
        int64, tokens before each boundary, increasing, inside the response: 0 < b < L.
    """
    cutpoints = np.flatnonzero(np.exp(logprobs_L.astype(np.float64)) < threshold)
    return _inside(cutpoints[every - 1 :: every] + 1, len(logprobs_L))


def fixed_boundaries(length: int, *, tokens: int) -> np.ndarray:
    """Boundaries behind every `tokens` tokens of a response of `length` tokens, as `cutpoint_boundaries`."""
    return np.arange(tokens, length, tokens, dtype=np.int64)


def _inside(boundaries: np.ndarray, length: int) -> np.ndarray:
    return boundaries[boundaries < length].astype(np.int64)


def chain_advantages(values_S: Sequence[float] | np.ndarray) -> np.ndarray:
    """A_s = V_{s+1} − V_s of the S segments between S + 1 values: of the start, of each boundary, of the end. fp64 [S],
    exactly 0 where values differ by rounding alone; the sum is V(end) − V(start) up to that.

    Raises:
        RunError: a value is not finite.
    """
    values = np.asarray(values_S, np.float64)
    _finite(values)
    return _without_rounding(np.diff(values))


def of_tokens(segments_S: np.ndarray, boundaries: np.ndarray, length: int) -> np.ndarray:
    """fp32 [L]: on every token the number of its segment."""
    sizes = np.diff(np.concatenate([[0], boundaries, [length]]))
    return np.repeat(segments_S.astype(np.float32), sizes.astype(np.int64))


def tree_values(parents_N: np.ndarray, rewards_N: np.ndarray) -> np.ndarray:
    """V(leaf) = its reward, V(node) = mean of V(children), fp64 [N].

    Args:
        parents_N: int [N], every node's parent, which stands before it; `ROOT` for nodes of the first level.
        rewards_N: of leaves; what stands at other nodes is not looked at.

    Raises:
        RunError: a leaf's reward is not finite.
    """
    inner = _has_children(parents_N)
    _finite(np.asarray(rewards_N, np.float64)[~inner])
    sums, counts = np.zeros(len(parents_N)), np.zeros(len(parents_N), np.int64)
    values = np.zeros(len(parents_N))
    for node in reversed(range(len(parents_N))):  # children stand behind their parent
        values[node] = sums[node] / counts[node] if inner[node] else rewards_N[node]
        if parents_N[node] != ROOT:
            sums[parents_N[node]] += values[node]
            counts[parents_N[node]] += 1
    return values


def tree_advantages(
    parents_N: np.ndarray, values_N: np.ndarray, *, normalise: Normalise = "none", epsilon: float = 1e-6
) -> np.ndarray:
    """A = V(node) − V(parent), fp64 [N]; V of the root is the mean of the first level.

    normalise "std": divided by (std + epsilon) of V over the node and its siblings, the children of one parent: as
    V(parent) is their mean, A is GRPO's advantage among siblings. Sample std (ddof 1). A is exactly 0 where the values
    of all siblings are equal up to rounding.
    """
    advantages = np.zeros(len(parents_N))
    for parent in np.unique(parents_N):
        siblings = np.flatnonzero(parents_N == parent)
        apart = _without_rounding(values_N[siblings] - values_N[siblings].mean())
        if normalise == "std" and apart.any():
            apart = apart / (values_N[siblings].std(ddof=1) + epsilon)
        advantages[siblings] = apart
    return advantages


@dataclass(frozen=True)
class TreeRow:
    """What one leaf's row consists of: the nodes from the first level down to it; `owned`: those whose tokens have a
    weight in this row."""

    nodes: list[int]
    owned: list[bool]


def tree_rows(parents_N: np.ndarray, *, untrained: np.ndarray | None = None) -> list[TreeRow]:
    """One row a leaf, from the first child down before the next. Every node is owned by one row, that of the first leaf
    below it; rows of leaves that are `untrained` (bool [N]) own none, and a node above such leaves alone has no owner.
    """
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents_N.tolist()):
        children.setdefault(parent, []).append(node)
    rows: list[TreeRow] = []
    seen: set[int] = set()
    paths = [[node] for node in reversed(children.get(ROOT, []))]
    while paths:
        path = paths.pop()
        below = children.get(path[-1], [])
        if not below:
            mine = untrained is None or not untrained[path[-1]]
            rows.append(TreeRow(path, [mine and node not in seen for node in path]))
            seen.update(path if mine else [])
        paths.extend([*path, node] for node in reversed(below))
    return rows


def _has_children(parents_N: np.ndarray) -> np.ndarray:
    found = np.zeros(len(parents_N), bool)
    found[parents_N[parents_N != ROOT]] = True
    return found


def _without_rounding(differences: np.ndarray) -> np.ndarray:
    return np.where(np.abs(differences) < ROUNDING, 0.0, differences)


def _finite(values: np.ndarray) -> None:
    bad = values[~np.isfinite(values)]
    if len(bad):
        raise RunError(f"a response's reward is {bad[0]}; rewards must be finite")
