import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.algorithms.mini_batch import (
    aggregate,
    batch_of_groups,
    correct_engine_mismatch,
    mini_batches,
    response_rows,
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


# rewards 1 and −1: mean 0, sample std √2; groups of equal rewards have advantage 0
A = 1 / (2**0.5 + 1e-6)


def test_a_batch_by_hand():
    batch = batch_of_groups(two_groups(), overlong_filtering=False, advantage_epsilon=1e-6)
    assert batch.tokens_T.tolist() == [7, 8, 3, 1, 7, 8, 4, 9, 5, 6, 1, 9, 2, 1]
    assert batch.offsets.tolist() == [0, 4, 7, 11, 14]
    # row t predicts token t + 1, so the last prompt row is trained and the last row is not
    assert batch.loss_weights_T.tolist() == [0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0, 1, 1, 0]
    expected = [0, A, A, 0, 0, -A, 0, 0, 0, 0, 0, 0, 0, 0]
    torch.testing.assert_close(batch.advantages_T, torch.tensor(expected))
    rows = [(rows.start, rows.stop, group.prompt_id, i) for rows, group, i in response_rows(batch, two_groups())]
    assert rows == [(1, 3, 0, 0), (5, 6, 0, 1), (7, 10, 1, 0), (11, 13, 1, 1)]


def test_overlong_filtering_takes_the_weight_but_not_the_say_in_mean_and_std():
    batch = batch_of_groups(two_groups(), overlong_filtering=True, advantage_epsilon=1e-6)
    assert batch.loss_weights_T.tolist() == [0, 1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 1, 1, 0]
    # had the truncated response left its group, the other's advantage would be 0
    torch.testing.assert_close(batch.advantages_T[:4], torch.tensor([0, A, A, 0]))
    assert aggregate(batch, [0, 1, 2, 3], "token-mean") == 7.0


def test_the_epsilon_is_used():
    batch = batch_of_groups(two_groups(), overlong_filtering=False, advantage_epsilon=1.0)
    assert batch.advantages_T[1].item() == pytest.approx(1 / (2**0.5 + 1))


def test_token_mean_by_hand():
    batch = batch_of_groups(two_groups(), overlong_filtering=False, advantage_epsilon=1e-6)
    before = batch.loss_weights_T.clone()
    assert aggregate(batch, [0, 1], "token-mean") == 3.0
    assert aggregate(batch, range(2, 4), "token-mean") == 5.0
    assert aggregate(batch, [], "token-mean") == 0.0
    assert torch.equal(batch.loss_weights_T, before)


def test_sequence_mean_by_hand():
    batch = batch_of_groups(two_groups(), overlong_filtering=True, advantage_epsilon=1e-6)
    # the filtered response counts neither in the sum nor in the denominator; sequence 3 is of another mini-batch
    assert aggregate(batch, [0, 1, 2], "sequence-mean") == 2.0
    expected = [0, 1 / 2, 1 / 2, 0, 0, 0, 0, 1 / 3, 1 / 3, 1 / 3, 0, 1, 1, 0]
    torch.testing.assert_close(batch.loss_weights_T, torch.tensor(expected))


def test_constant_length_by_hand():
    batch = batch_of_groups(two_groups(), overlong_filtering=True, advantage_epsilon=1e-6)
    before = batch.loss_weights_T.clone()
    # the filtered response counts: the denominator depends on nothing that was drawn
    assert aggregate(batch, [0, 1, 2], "constant-length", constant_length=10) == 30.0
    assert aggregate(batch, [1], "constant-length", constant_length=10) == 0.0, "no token is trained"
    assert torch.equal(batch.loss_weights_T, before)


def test_without_the_division_the_advantage_is_the_distance_to_the_mean():
    batch = batch_of_groups(two_groups(), overlong_filtering=False, advantage_epsilon=1e-6, advantage="group-mean")
    assert batch.advantages_T.tolist() == [0, 1, 1, 0, 0, -1, 0, 0, 0, 0, 0, 0, 0, 0]


def test_a_penalty_is_taken_from_the_reward_before_the_advantage():
    groups = two_groups()
    penalties = [np.array([0.5, 0.0]), np.array([0.0, 3.0])]
    batch = batch_of_groups(
        groups, overlong_filtering=False, advantage_epsilon=1e-6, advantage="group-mean", penalties=penalties
    )
    # rewards 0.5 and −1: mean −0.25; 1 and −2: mean −0.5
    assert batch.advantages_T.tolist() == [0, 0.75, 0.75, 0, 0, -0.75, 0, 1.5, 1.5, 1.5, 0, -1.5, -1.5, 0]
    assert [g.rewards.tolist() for g in groups] == [[1, -1], [1, 1]], "a kept group would be charged twice"


def test_reference_logprobs_lie_where_the_old_ones_do():
    groups = two_groups()
    assert batch_of_groups(groups, overlong_filtering=False, advantage_epsilon=1e-6).reference_logprobs_T is None
    groups[0].reference_logprobs = [c.logprobs - 1 for c in groups[0].completions]
    assert batch_of_groups(groups, overlong_filtering=False, advantage_epsilon=1e-6).reference_logprobs_T is None
    groups[1].reference_logprobs = [c.logprobs - 1 for c in groups[1].completions]
    batch = batch_of_groups(groups, overlong_filtering=False, advantage_epsilon=1e-6)
    logprobs = [0, -1 / 2, -1, 0, 0, -1 / 3, 0, -1 / 4, -2 / 4, -3 / 4, 0, -1 / 5, -2 / 5, 0]
    expected = torch.where(batch.loss_weights_T > 0, torch.tensor(logprobs) - 1, 0.0)
    torch.testing.assert_close(batch.reference_logprobs_T, expected)


def test_old_logprobs_travel_with_the_group():
    groups = two_groups()
    assert not batch_of_groups(groups, overlong_filtering=False, advantage_epsilon=1e-6).old_logprobs_T.any()
    for g in groups:
        g.old_logprobs = [c.logprobs - 1 for c in g.completions]
    batch = batch_of_groups(groups, overlong_filtering=False, advantage_epsilon=1e-6)
    logprobs = [0, -1 / 2, -1, 0, 0, -1 / 3, 0, -1 / 4, -2 / 4, -3 / 4, 0, -1 / 5, -2 / 5, 0]
    expected = torch.where(batch.loss_weights_T > 0, torch.tensor(logprobs) - 1, 0.0)
    torch.testing.assert_close(batch.old_logprobs_T, expected)


def test_truncated_importance_sampling_by_hand():
    groups = two_groups()
    for g in groups:
        g.old_logprobs = [c.logprobs for c in g.completions]
    batch = batch_of_groups(groups, overlong_filtering=True, advantage_epsilon=1e-6)
    trained = batch.loss_weights_T > 0
    steps = torch.tensor([0.0, 0.5, 1.0, -1.0, 100.0, -100.0, 0.25])  # 7 trained tokens
    batch.old_logprobs_T[trained] += steps
    assert aggregate(batch, range(4), "token-mean") == 7.0
    mean, bounded = correct_engine_mismatch(batch, groups, 2.0)
    expected = torch.tensor([1, math.exp(0.5), 2, math.exp(-1), 2, math.exp(-20), math.exp(0.25)])
    torch.testing.assert_close(batch.loss_weights_T[trained], expected)
    assert mean == pytest.approx(float(expected.mean())) and bounded == pytest.approx(2 / 7)
    assert torch.equal(batch.loss_weights_T > 0, trained), "a small weight does not take a token out of the count"
    assert aggregate(batch, range(4), "token-mean") == 7.0


@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean"])
def test_the_denominator_is_the_sum_of_the_weights(aggregation):
    batch = batch_of_groups(two_groups(), overlong_filtering=False, advantage_epsilon=1e-6)
    denominator = aggregate(batch, range(4), aggregation)
    assert float(batch.loss_weights_T.sum()) == pytest.approx(denominator)
    # loss = Σ w·L / denominator against the definitions, for L = row number
    rows = torch.arange(14.0)
    spans = [rows[1:3], rows[5:6], rows[7:10], rows[11:13]]
    by_hand = {
        "token-mean": torch.cat(spans).mean(),
        "sequence-mean": torch.stack([span.mean() for span in spans]).mean(),
    }
    torch.testing.assert_close((batch.loss_weights_T * rows).sum() / denominator, by_hand[aggregation])


@given(st.integers(0, 30), st.integers(1, 8), st.integers(1, 9))
@settings(deadline=None)
def test_mini_batches_are_whole_groups_in_order(groups, samples, prompts_per_update):
    found = mini_batches(groups, samples, prompts_per_update)
    assert [i for part in found for i in part] == list(range(groups * samples))
    assert all(len(part) == prompts_per_update * samples for part in found[:-1])
    assert all(0 < len(part) <= prompts_per_update * samples and part.start % samples == 0 for part in found)
