"""SPO's chain (arXiv 2505.23564): responses are cut into segments, and every cut is valued by continuing from it.

    V(start) = mean reward of the group          V(cut) = mean reward of N continuations of prompt + prefix
    V(end)   = the response's own reward         A of a segment = V(behind it) − V(before it), on each of its tokens

A segment of advantage 0 has weight 0. One wave of requests values all cuts of all groups.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dapo_megatron.algorithms.segments import chain_advantages, cutpoint_boundaries, fixed_boundaries, of_tokens
from dapo_megatron.config.rollout import Partition, Rollout
from dapo_megatron.data.completions import Completion, PromptGroup, SegmentCounts
from dapo_megatron.rollout.engine import RolloutRequest, sample_seed

Generate = Callable[[list[RolloutRequest], int], list[Completion]]
"""All requests at once → completions in their order; as many consecutive ones stay on one engine."""
Reward = Callable[[Sequence[int], Sequence[np.ndarray]], np.ndarray]
"""(the group's number, the response's tokens) of each → rewards [n], shaping included."""


GRADED_AT_ONCE = 1 << 14  # whole texts of all continuations of a large step would not fit into memory
Cut = tuple[int, int, int]  # group, response, tokens of the response before it


@dataclass(frozen=True)
class _Valued:
    """Mean reward of a cut's continuations, and the tokens drawn for it."""

    value: float
    tokens: int


def boundaries(logprobs_L: np.ndarray, partition: Partition) -> np.ndarray:
    """int64, tokens before each boundary inside a response whose tokens were drawn with these log-probs."""
    if partition.kind == "fixed":
        return fixed_boundaries(len(logprobs_L), tokens=partition.tokens)
    return cutpoint_boundaries(logprobs_L, threshold=partition.threshold, every=partition.cutpoints)


def value_chains(
    groups: Mapping[int, PromptGroup],
    rollout: Rollout,
    *,
    generate: Generate,
    reward: Reward,
    seed_key: tuple[int, ...],
    overlong_filtering: bool,
) -> None:
    """Leave advantages, weights and counts in the groups, which are graded; keys are their numbers in the wave.

    Draw k of the cut behind p tokens of response j to prompt i has the seed (seed_key, i, j, p, k). A truncated
    response that is filtered has no part in the loss: it is not cut, its weight is 0.
    """
    inner = {
        (i, j): boundaries(completion.logprobs, rollout.partition)
        for i, group in groups.items()
        for j, completion in enumerate(group.completions)
        if not (overlong_filtering and completion.finish_reason == "length")
    }
    cuts = [(i, j, prefix) for (i, j), edges in inner.items() for prefix in edges.tolist()]
    valued = dict(zip(cuts, _continue(groups, cuts, rollout, generate, reward, seed_key), strict=True))
    for i, group in groups.items():
        edges_G = [inner.get((i, j)) for j in range(len(group.completions))]
        valued_G = [
            [] if edges is None else [valued[i, j, prefix] for prefix in edges.tolist()]
            for j, edges in enumerate(edges_G)
        ]
        _fill(group, edges_G, valued_G, rollout.chain.continuations)


def _continue(
    groups: Mapping[int, PromptGroup],
    cuts: Sequence[Cut],
    rollout: Rollout,
    generate: Generate,
    reward: Reward,
    seed_key: tuple[int, ...],
) -> list[_Valued]:
    """All continuations of all cuts, drawn in one wave and graded as whole responses."""
    if not cuts:
        return []
    count = rollout.chain.continuations
    prefixes = [groups[i].completions[j].tokens[:length] for i, j, length in cuts]
    prompts = [np.concatenate([groups[cut[0]].prompt_tokens, p]) for cut, p in zip(cuts, prefixes, strict=True)]
    requests = [
        RolloutRequest(
            ticket=n * count + k,
            prompt_tokens=prompts[n],  # one array for all draws
            seed=sample_seed(*seed_key, *cut, k),
            max_new_tokens=rollout.max_response_length - cut[2],
            temperature=rollout.temperature,
            top_p=rollout.top_p,
        )
        for n, cut in enumerate(cuts)
        for k in range(count)
    ]
    drawn = generate(requests, count)
    rewards = []
    for first in range(0, len(drawn), GRADED_AT_ONCE):
        part = range(first, min(first + GRADED_AT_ONCE, len(drawn)))
        whole = [np.concatenate([prefixes[n // count], drawn[n].tokens]) for n in part]
        rewards.append(reward([cuts[n // count][0] for n in part], whole))
    rewards_CN = np.concatenate(rewards).reshape(-1, count)
    tokens_CN = np.array([len(completion.tokens) for completion in drawn]).reshape(-1, count)
    return [_Valued(float(r.mean(dtype=np.float64)), int(n.sum())) for r, n in zip(rewards_CN, tokens_CN, strict=True)]


def _fill(
    group: PromptGroup,
    edges_G: Sequence[np.ndarray | None],
    valued_G: Sequence[Sequence[_Valued]],
    continuations: int,
) -> None:
    start = float(group.rewards.mean(dtype=np.float64))
    segments = dropped = 0
    group.advantages, group.weights = [], []
    columns = (group.completions, group.rewards.tolist(), edges_G, valued_G)
    for completion, own, edges, valued in zip(*columns, strict=True):
        length = len(completion.tokens)
        if edges is None:
            group.advantages.append(np.zeros(length, np.float32))
            group.weights.append(np.zeros(length, np.float32))
            continue
        advantages = chain_advantages([start, *(v.value for v in valued), own])
        group.advantages.append(of_tokens(advantages, edges, length))
        group.weights.append(of_tokens(advantages != 0, edges, length))
        segments += len(advantages)
        dropped += int((advantages == 0).sum())
    drawn = [v for valued in valued_G for v in valued]
    group.counts = SegmentCounts(
        segments=segments,
        dropped=dropped,
        continuations=len(drawn) * continuations,
        generated=sum(len(c.tokens) for c in group.completions) + sum(v.tokens for v in drawn),
        repeated=0,
    )
