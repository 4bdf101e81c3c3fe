import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.algorithms.mini_batch import (
    aggregate,
    batch_of_groups,
    correct_engine_mismatch,
    mini_batches,
)
from dapo_megatron.data.completions import Completion, PromptGroup


def completion(ticket: int, tokens: list[int], reason: str = "stop") -> Completion:
    size = len(tokens)
    logprobs = -(np.arange(size, dtype=np.float32) + 1) / (ticket + 2)
    return Completion(ticket, np.array(tokens, np.int32), logprobs, reason, np.zeros(size, np.int32))


def group(number: int, prompt: list[int], completions: list[Completion], rewards: list[float]) -> PromptGroup:
    return PromptGroup(
        number, "", "", np.array(prompt, np.int32), completions,
        rewards=np.array(rewards, np.float32), accuracies=np.array(rewards) > 0,
    )  # fmt: skip


def two_groups() -> list[PromptGroup]:
    return [
        group(0, [7, 8], [completion(0, [3, 1]), completion(1, [4], "length")], [1.0, -1.0]),
        group(1, [9], [completion(2, [5, 6, 1]), completion(3, [2, 1])], [1.0, 1.0]),
    ]


def numbers(arrays: list[np.ndarray]) -> list[list[float]]:
    return [values.tolist() for values in arrays]


def assert_close(found: list[np.ndarray], expected: list[list[float]]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == np.float32 and a.tolist() == pytest.approx(b, rel=1e-6)


# rewards 1 and −1: mean 0, sample std √2; groups of equal rewards have advantage 0
A = 1 / (2**0.5 + 1e-6)


def test_a_batch_by_hand():
    batch = batch_of_groups(two_groups(), overlong_filtering=False, advantage_epsilon=1e-6)
    assert numbers(batch.prompts) == [[7, 8], [7, 8], [9], [9]] and batch.lengths == [4, 3, 4, 3]
    assert numbers(batch.responses) == [[3, 1], [4], [5, 6, 1], [2, 1]]
    assert numbers(batch.loss_weights) == [[1, 1], [1], [1, 1, 1], [1, 1]]
    assert_close(batch.advantages, [[A, A], [-A], [0, 0, 0], [0, 0]])


def test_overlong_filtering_takes_the_weight_but_not_the_say_in_mean_and_std():
    batch = batch_of_groups(two_groups(), overlong_filtering=True, advantage_epsilon=1e-6)
    assert numbers(batch.loss_weights) == [[1, 1], [0], [1, 1, 1], [1, 1]]
    # had the truncated response left its group, the other's advantage would be 0
    assert_close(batch.advantages[:1], [[A, A]])
    assert aggregate(batch, [0, 1, 2, 3], "token-mean") == 7.0


def test_the_epsilon_is_used():
    batch = batch_of_groups(two_groups(), overlong_filtering=False, advantage_epsilon=1.0)
    assert float(batch.advantages[0][0]) == pytest.approx(1 / (2**0.5 + 1))


def test_token_mean_by_hand():
    batch = batch_of_groups(two_groups(), overlong_filtering=False, advantage_epsilon=1e-6)
    before = numbers(batch.loss_weights)
    assert aggregate(batch, [0, 1], "token-mean") == 3.0
    assert aggregate(batch, range(2, 4), "token-mean") == 5.0
    assert aggregate(batch, [], "token-mean") == 0.0
    assert numbers(batch.loss_weights) == before


def test_sequence_mean_by_hand():
    batch = batch_of_groups(two_groups(), overlong_filtering=True, advantage_epsilon=1e-6)
    # the filtered response counts neither in the sum nor in the denominator; sequence 3 is of another mini-batch
    assert aggregate(batch, [0, 1, 2], "sequence-mean") == 2.0
    assert_close(batch.loss_weights, [[1 / 2, 1 / 2], [0], [1 / 3, 1 / 3, 1 / 3], [1, 1]])


def test_constant_length_by_hand():
    batch = batch_of_groups(two_groups(), overlong_filtering=True, advantage_epsilon=1e-6)
    before = numbers(batch.loss_weights)
    # the filtered response counts: the denominator depends on nothing that was drawn
    assert aggregate(batch, [0, 1, 2], "constant-length", constant_length=10) == 30.0
    assert aggregate(batch, [1], "constant-length", constant_length=10) == 0.0, "no token is trained"
    assert numbers(batch.loss_weights) == before


def test_without_the_division_the_advantage_is_the_distance_to_the_mean():
    batch = batch_of_groups(two_groups(), overlong_filtering=False, advantage_epsilon=1e-6, advantage="group-mean")
    assert numbers(batch.advantages) == [[1, 1], [-1], [0, 0, 0], [0, 0]]


def test_a_penalty_is_taken_from_the_reward_before_the_advantage():
    groups = two_groups()
    penalties = [np.array([0.5, 0.0]), np.array([0.0, 3.0])]
    batch = batch_of_groups(
        groups, overlong_filtering=False, advantage_epsilon=1e-6, advantage="group-mean", penalties=penalties
    )
    # rewards 0.5 and −1: mean −0.25; 1 and −2: mean −0.5
    assert numbers(batch.advantages) == [[0.75, 0.75], [-0.75], [1.5, 1.5, 1.5], [-1.5, -1.5]]
    assert [g.rewards.tolist() for g in groups] == [[1, -1], [1, 1]], "a kept group would be charged twice"


def test_reference_logprobs_are_there_when_all_groups_carry_them():
    groups = two_groups()
    assert batch_of_groups(groups, overlong_filtering=False, advantage_epsilon=1e-6).reference_logprobs is None
    groups[0].reference_logprobs = [c.logprobs - 1 for c in groups[0].completions]
    assert batch_of_groups(groups, overlong_filtering=False, advantage_epsilon=1e-6).reference_logprobs is None
    groups[1].reference_logprobs = [c.logprobs - 1 for c in groups[1].completions]
    batch = batch_of_groups(groups, overlong_filtering=False, advantage_epsilon=1e-6)
    assert all(map(np.shares_memory, batch.reference_logprobs, [v for g in groups for v in g.reference_logprobs]))


def test_old_logprobs_travel_with_the_group():
    groups = two_groups()
    unscored = batch_of_groups(groups, overlong_filtering=False, advantage_epsilon=1e-6)
    assert numbers(unscored.old_logprobs) == [[0, 0], [0], [0, 0, 0], [0, 0]]
    for g in groups:
        g.old_logprobs = [c.logprobs - 1 for c in g.completions]
    batch = batch_of_groups(groups, overlong_filtering=False, advantage_epsilon=1e-6)
    assert all(map(np.shares_memory, batch.old_logprobs, [v for g in groups for v in g.old_logprobs]))


def test_truncated_importance_sampling_by_hand():
    groups = two_groups()
    for g in groups:
        g.old_logprobs = [c.logprobs for c in g.completions]
    batch = batch_of_groups(groups, overlong_filtering=True, advantage_epsilon=1e-6)
    before = numbers(batch.loss_weights)
    steps = [[0.0, 0.5], [7.0], [1.0, -1.0, 100.0], [-100.0, 0.25]]  # 7 trained tokens; the second is filtered
    batch.old_logprobs = [old + np.float32(step) for old, step in zip(batch.old_logprobs, steps, strict=True)]
    assert aggregate(batch, range(4), "token-mean") == 7.0
    mean, bounded = correct_engine_mismatch(batch, groups, 2.0)
    expected = [[1, math.exp(0.5)], [0], [2, math.exp(-1), 2], [math.exp(-20), math.exp(0.25)]]
    assert_close(batch.loss_weights, expected)
    assert mean == pytest.approx(sum(map(sum, expected)) / 7) and bounded == pytest.approx(2 / 7)
    assert [[float(w > 0) for w in part] for part in batch.loss_weights] == before, "a small weight still counts"
    assert aggregate(batch, range(4), "token-mean") == 7.0


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
def test_the_denominator_is_the_sum_of_the_weights(aggregation):
    batch = batch_of_groups(two_groups(), overlong_filtering=False, advantage_epsilon=1e-6)
    denominator = aggregate(batch, range(4), aggregation)
    assert batch.weight_sum == pytest.approx(denominator)
    # loss = Σ w·L / denominator against the definitions, for any L
    losses = [np.array(values) for values in ([1.0, 2.0], [5.0], [7.0, 8.0, 9.0], [11.0, 12.0])]
    by_hand = {
        "token-mean": np.concatenate(losses).mean(),
        "sequence-mean": np.mean([part.mean() for part in losses]),
    }
    found = sum(float((w * part).sum()) for w, part in zip(batch.loss_weights, losses, strict=True)) / denominator
    assert found == pytest.approx(by_hand[aggregation])


@given(st.integers(0, 30), st.integers(1, 8), st.integers(1, 9))
@settings(deadline=None)
def test_mini_batches_are_whole_groups_in_order(groups, samples, prompts_per_update):
    found = mini_batches(groups, samples, prompts_per_update)
    assert [i for part in found for i in part] == list(range(groups * samples))
    assert all(len(part) == prompts_per_update * samples for part in found[:-1])
    assert all(0 < len(part) <= prompts_per_update * samples and part.start % samples == 0 for part in found)
