import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dapo_megatron.algorithms.advantages import group_advantages, mixed_groups, select_groups, varied_groups
from dapo_megatron.errors import RequestError, RunError

REWARDS = st.floats(-100, 100, allow_nan=False, width=32)
GROUPS = st.integers(1, 8).flatmap(
    lambda g: st.lists(st.lists(REWARDS, min_size=g, max_size=g), min_size=1, max_size=5)
)


def by_hand(group: list[float], ddof: int, epsilon: float) -> list[float]:
    """The formula in exactly rounded sums, without numpy."""
    mean = math.fsum(group) / len(group)
    deviations = [reward - mean for reward in group]
    if len(set(group)) == 1:
        return [0.0] * len(group)
    std = math.sqrt(math.fsum(d * d for d in deviations) / (len(group) - ddof))
    return [d / (std + epsilon) for d in deviations]


def test_hand_computed_values():
    # +1 +1 +1 −1: mean 1/2, deviations 1/2 1/2 1/2 −3/2, sample variance 3/3 = 1
    right = 0.5 / (1 + 1e-6)
    wrong = -1.5 / (1 + 1e-6)
    # 1 0: mean 1/2, sample variance 1/2
    advantages = group_advantages([[1, 1, 1, -1], [1, -1, 1, -1], [1, 1, 1, 1]])
    assert advantages.dtype == np.float32
    balanced = 1 / (math.sqrt(4 / 3) + 1e-6)
    expected = [[right, right, right, wrong], [balanced, -balanced, balanced, -balanced], [0, 0, 0, 0]]
    np.testing.assert_array_equal(advantages, np.array(expected, dtype=np.float32))


def test_population_std_and_another_epsilon():
    # mean 2, population variance (4 + 0 + 4) / 3
    advantages = group_advantages([[0.0, 2.0, 4.0]], ddof=0, epsilon=0.5)
    scale = math.sqrt(8 / 3) + 0.5
    np.testing.assert_array_equal(advantages, np.array([[-2 / scale, 0, 2 / scale]], dtype=np.float32))


@given(GROUPS, st.sampled_from([0, 1]), st.sampled_from([1e-6, 1e-2, 1.0]))
def test_the_formula(rewards: list[list[float]], ddof: int, epsilon: float):
    expected = [by_hand(group, ddof, epsilon) for group in rewards]
    np.testing.assert_allclose(group_advantages(rewards, ddof=ddof, epsilon=epsilon), expected, rtol=1e-6, atol=1e-7)


@given(GROUPS)
def test_zero_mean_and_bounded_spread(rewards: list[list[float]]):
    advantages = group_advantages(rewards).astype(np.float64)
    size = advantages.shape[1]
    np.testing.assert_allclose(advantages.mean(axis=1), 0, atol=1e-6)
    # Σ A² = (G − 1) · (std / (std + ε))² < G − 1
    assert ((advantages**2).sum(axis=1) <= (size - 1) * (1 + 1e-6)).all()


@given(GROUPS, st.integers(-50, 50), st.sampled_from([0.25, 2.0, 8.0]))
def test_shift_and_scale_do_not_matter(rewards: list[list[float]], shift: int, scale: float):
    values = np.array(rewards)
    spread = values.max(axis=1) - values.min(axis=1)
    # below this a shift rounds the spread itself away, and epsilon is felt
    assume(((spread == 0) | (spread > 1)).all())
    moved = group_advantages(values * scale + shift)
    np.testing.assert_allclose(moved, group_advantages(values), atol=2e-5)


@given(GROUPS)
def test_order_within_a_group_is_kept_and_groups_do_not_meet(rewards: list[list[float]]):
    together = group_advantages(rewards)
    for b, group in enumerate(rewards):
        np.testing.assert_array_equal(together[b], group_advantages([group])[0])
        for better, worse in zip(np.argsort(group)[1:], np.argsort(group)[:-1], strict=True):
            assert together[b][better] >= together[b][worse]


@given(REWARDS, st.integers(1, 33))
def test_equal_rewards_give_exactly_zero(reward: float, size: int):
    # 0.1 is among them: its mean over a group is not always 0.1
    for value in (reward, 0.1, reward / 3):
        assert not group_advantages([[value] * size]).any()


@given(st.lists(REWARDS, min_size=1, max_size=5))
def test_a_group_of_one_is_zero(rewards: list[float]):
    advantages = group_advantages([[reward] for reward in rewards])
    assert advantages.shape == (len(rewards), 1)
    assert not advantages.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_a_tensor_gives_a_tensor(dtype: torch.dtype):
    rewards = torch.tensor([[1, -1, 1], [0, 0, 0]], dtype=dtype)
    advantages = group_advantages(rewards)
    assert isinstance(advantages, torch.Tensor)
    assert advantages.dtype == torch.float32
    np.testing.assert_array_equal(advantages.numpy(), group_advantages(rewards.tolist()))


def test_computed_in_double_precision():
    # float32 cannot tell these rewards from each other
    rewards = np.array([[1e8, 1e8 + 1, 1e8 + 2]])
    np.testing.assert_allclose(group_advantages(rewards), [[-1, 0, 1]], atol=1e-5)


def test_the_input_is_left_alone():
    rewards = np.array([[1.0, -1.0]])
    group_advantages(rewards)
    assert rewards.tolist() == [[1.0, -1.0]]


def test_no_groups():
    assert group_advantages(np.empty((0, 4))).shape == (0, 4)
    assert mixed_groups(np.empty((0, 4))).shape == (0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rewards_that_are_no_numbers_stop_the_run(bad: float):
    with pytest.raises(RunError, match=f"reward of response 1 in group 1 is {bad}"):
        group_advantages([[1.0, 0.0], [1.0, bad]])


@pytest.mark.parametrize("function", [group_advantages, mixed_groups, varied_groups])
def test_other_shapes_are_an_error(function):
    with pytest.raises(ValueError, match="two dimensions"):
        function([1.0, 0.0])


def test_mixed_groups():
    accuracies = np.array([[0, 0, 0], [0, 1, 0], [1, 1, 0], [1, 1, 1]], dtype=bool)
    assert mixed_groups(accuracies).tolist() == [False, True, True, False]
    assert mixed_groups([[1], [0]]).tolist() == [False, False]
    mask = mixed_groups(torch.from_numpy(accuracies))
    assert mask.dtype == torch.bool and mask.tolist() == [False, True, True, False]
    with pytest.raises(ValueError, match="0 and 1 only"):
        mixed_groups([[0.5, 1.0]])


@settings(deadline=None)
@given(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=6))
def test_mixed_groups_are_those_with_a_gradient(accuracies: list[list[bool]]):
    rewards = np.where(accuracies, 1.0, -1.0)
    by_accuracy = select_groups("accuracy", accuracies, rewards)
    assert by_accuracy.tolist() == [0 < sum(group) < 4 for group in accuracies]
    assert by_accuracy.tolist() == select_groups("reward_std", accuracies, rewards).tolist()
    assert by_accuracy.tolist() == group_advantages(rewards).any(axis=1).tolist()


def test_shaped_rewards_separate_the_two_metrics():
    accuracies = [[1, 1], [0, 1]]
    rewards = [[1.0, 0.5], [0.2, 0.2]]  # punished length within all-right; shaping that evens a mixed group out
    assert select_groups("accuracy", accuracies, rewards).tolist() == [False, True]
    assert select_groups("reward_std", accuracies, rewards).tolist() == [True, False]
    assert varied_groups(torch.tensor(rewards)).tolist() == [True, False]


def test_unknown_metric_is_refused():
    with pytest.raises(RequestError, match=r"algorithm\.dynamic_sampling\.metric=std .*accuracy or reward_std"):
        select_groups("std", [[1]], [[1]])
