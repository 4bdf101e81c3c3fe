import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.algorithms.statistics import covariance


def by_hand(advantages, logprobs):
    a, p = np.asarray(advantages, np.float64), np.asarray(logprobs, np.float64)
    cov = np.sort((a - a.mean()) * (p - p.mean()))[::-1]
    return cov.mean(), cov[: max(1, int(0.002 * len(cov)))].mean()


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 99))
def test_against_float64(count, seed):
    generator = np.random.default_rng(seed)
    advantages = generator.choice([-1.5, 0.5, 2.0], count).astype(np.float32)
    logprobs = -generator.exponential(1.0, count).astype(np.float32)
    mean, top = covariance(torch.from_numpy(advantages), torch.from_numpy(logprobs))
    expected = by_hand(advantages, logprobs)
    assert (mean, top) == (pytest.approx(expected[0], abs=1e-5), pytest.approx(expected[1], rel=1e-4, abs=1e-5))


def test_the_inputs_are_left_alone_and_no_token_is_nothing():
    advantages, logprobs = torch.tensor([1.0, -1.0]), torch.tensor([-0.5, -1.5])
    assert covariance(advantages, logprobs) == (0.5, 0.5)
    assert advantages.tolist() == [1.0, -1.0] and logprobs.tolist() == [-0.5, -1.5]
    assert covariance(torch.zeros(0), torch.zeros(0)) == (0.0, 0.0)


@pytest.mark.parametrize("order", ["random", "rising", "falling", "periodic"])
def test_the_top_of_many_tokens_is_exact(order):
    """More tokens than are looked at to guess where the top begins, and orders that mislead the guess."""
    generator = np.random.default_rng(0)
    values = generator.standard_normal(3_000_000).astype(np.float32)
    values = {"random": values, "rising": np.sort(values), "falling": np.sort(values)[::-1].copy()}.get(order, values)
    if order == "periodic":  # every third value, just those that are looked at, is larger than all others
        values[::3] += 20
    advantages = np.ones_like(values)
    advantages[: len(values) // 2] = -1
    found = covariance(torch.from_numpy(advantages), torch.from_numpy(values))
    assert found == pytest.approx(by_hand(advantages, values), rel=1e-3, abs=1e-5)
