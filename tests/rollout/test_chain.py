"""Chains by a scripted engine: the requests, and every token's advantage from what was drawn."""

import math
from itertools import pairwise

import numpy as np
import pytest

from dapo_megatron.config.rollout import Chain, Partition, Rollout
from dapo_megatron.data.completions import PromptGroup
from dapo_megatron.rollout import chain
from dapo_megatron.rollout.chain import boundaries, value_chains
from dapo_megatron.rollout.engine import sample_seed
from tests.rollout.engines import request
from tests.rollout.scripted import ScriptedEngine, reward_of

LONGEST, COUNT, KEY = 24, 3, (7, 5, 2, 0)
PARTITIONS = {
    "cutpoint": Partition(kind="cutpoint", cutpoints=2),
    "fixed": Partition(kind="fixed", tokens=4),
}


def group(number: int, engine: ScriptedEngine, samples: int = 3) -> PromptGroup:
    prompt = [20 + number, 30]
    completions = [engine.answer(request(10 * number + j, prompt, LONGEST)) for j in range(samples)]
    return PromptGroup(
        number, f"question {number}", "", np.array(prompt, np.int32), completions,
        accuracies=np.array([reward_of(c.tokens) > 0 for c in completions]),
        rewards=np.array([reward_of(c.tokens) for c in completions], np.float32),
    )  # fmt: skip


def value(groups: dict[int, PromptGroup], partition: Partition, *, filtering: bool = False) -> ScriptedEngine:
    engine = ScriptedEngine(stop=0.1)
    rollout = Rollout(
        shape="chain", partition=partition, chain=Chain(continuations=COUNT), max_response_length=LONGEST,
        temperature=0.8,
    )  # fmt: skip
    value_chains(
        groups, rollout, generate=engine.generate, seed_key=KEY, overlong_filtering=filtering,
        reward=lambda owners, tokens: np.array([reward_of(t) for t in tokens], np.float32),
    )  # fmt: skip
    return engine


@pytest.fixture
def groups() -> dict[int, PromptGroup]:
    return {number: group(number, ScriptedEngine(stop=0.08)) for number in (0, 3)}  # 1 and 2 are not to be valued


@pytest.mark.parametrize("kind", PARTITIONS)
def test_one_wave_continues_every_cut(groups, kind):
    engine = value(groups, PARTITIONS[kind])
    assert len(engine.waves) == 1 and engine.together == [COUNT]
    expected = [
        (g.prompt_tokens.tolist() + c.tokens[:cut].tolist(), sample_seed(*KEY, i, j, cut, k), LONGEST - cut)
        for i, g in groups.items()
        for j, c in enumerate(g.completions)
        for cut in boundaries(c.logprobs, PARTITIONS[kind]).tolist()
        for k in range(COUNT)
    ]
    found = [(r.prompt_tokens.tolist(), r.seed, r.max_new_tokens) for r in engine.waves[0]]
    assert found == expected and len(found) > 20
    assert {(r.temperature, r.top_p) for r in engine.waves[0]} == {(0.8, 1.0)}
    assert len({r.seed for r in engine.waves[0]}) == len(found)


def test_grading_in_parts_changes_nothing(groups, monkeypatch):
    value(groups, PARTITIONS["fixed"])
    whole = [a.tolist() for g in groups.values() for a in g.advantages]
    monkeypatch.setattr(chain, "GRADED_AT_ONCE", 7)
    value(groups, PARTITIONS["fixed"])
    assert [a.tolist() for g in groups.values() for a in g.advantages] == whole


@pytest.mark.parametrize("kind", PARTITIONS)
def test_advantages_are_differences_of_the_values_drawn(groups, kind):
    engine = value(groups, PARTITIONS[kind])
    continued = {
        (*r.prompt_tokens.tolist(), k % COUNT): reward_of(
            np.concatenate([r.prompt_tokens[2:], engine.answer(r).tokens])
        )
        for k, r in enumerate(engine.waves[0])
    }
    for g in groups.values():
        segments = dropped = 0
        for j, completion in enumerate(g.completions):
            cuts = boundaries(completion.logprobs, PARTITIONS[kind]).tolist()
            values = [float(np.mean(g.rewards, dtype=np.float64))]
            for cut in cuts:
                prefix = (*g.prompt_tokens.tolist(), *completion.tokens[:cut].tolist())
                values.append(sum(continued[(*prefix, k)] for k in range(COUNT)) / COUNT)
            values.append(float(g.rewards[j]))
            edges = [0, *cuts, len(completion.tokens)]
            for (start, stop), (before, behind) in zip(pairwise(edges), pairwise(values), strict=True):
                assert g.advantages[j][start:stop].tolist() == pytest.approx([behind - before] * (stop - start))
                assert g.weights[j][start:stop].tolist() == [float(not math.isclose(behind, before))] * (stop - start)
                segments, dropped = segments + 1, dropped + math.isclose(behind, before)
            firsts = g.advantages[j][edges[:-1]]
            assert float(firsts.sum()) == pytest.approx(float(g.rewards[j] - g.rewards.mean()), abs=1e-6)
        counts = g.counts
        assert (counts.segments, counts.dropped, counts.repeated) == (segments, dropped, 0)
        mine = [r for r in engine.waves[0] if r.prompt_tokens[0] == g.prompt_tokens[0]]
        assert counts.continuations == len(mine)
        drawn = sum(len(engine.answer(r).tokens) for r in mine) + sum(len(c.tokens) for c in g.completions)
        assert counts.generated == g.generated_tokens == drawn
    assert 0 < sum(g.counts.dropped for g in groups.values()) < sum(g.counts.segments for g in groups.values())


def test_a_truncated_response_that_is_filtered_is_not_cut(groups):
    truncated = groups[0].completions[0] = ScriptedEngine(stop=0).answer(request(0, [20, 30], LONGEST))
    assert truncated.finish_reason == "length"
    engine = value(groups, PARTITIONS["fixed"], filtering=True)
    heads = [r.prompt_tokens[2:].tolist() for r in engine.waves[0] if r.prompt_tokens[0] == 20]
    assert heads and all(head != truncated.tokens[: len(head)].tolist() for head in heads)
    assert not groups[0].weights[0].any() and not groups[0].advantages[0].any()
    value(groups, PARTITIONS["fixed"], filtering=False)
    assert groups[0].weights[0].any()


def test_responses_of_one_segment_need_no_engine(groups):
    engine = value(groups, Partition(kind="fixed", tokens=LONGEST - 1))
    assert all(r.max_new_tokens == 1 for wave in engine.waves for r in wave)
    short = {0: groups[0]}
    short[0].completions = [ScriptedEngine(stop=1).answer(request(j, [20, 30], LONGEST)) for j in range(3)]
    assert value(short, PARTITIONS["fixed"]).waves == []
    expected = (short[0].rewards - short[0].rewards.mean()).tolist()
    assert [float(a) for (a,) in short[0].advantages] == pytest.approx(expected)
