"""GAE against its definition, whitening and explained variance against numpy's own moments."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.algorithms.gae import (
    discounted_sums,
    explained_variance,
    generalized_advantages,
    token_rewards,
    whiten,
)

UNHURRIED = settings(deadline=None, max_examples=50)  # a busy machine
FACTORS = st.sampled_from([0.0, 0.3, 0.95, 0.999, 1.0])


def numbers(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=length).astype(np.float32)


@UNHURRIED
@given(st.integers(0, 200), st.integers(0, 2**32), FACTORS, FACTORS)
def test_advantages_by_their_definition(length, seed, gamma, lam):
    """A_t = Σ_k (γλ)^k δ_{t+k}, term by term; lengths around the block size of 64 too."""
    rewards, values = numbers(seed, length), numbers(seed + 1, length)
    after = [*values.astype(float)[1:], 0.0]
    deltas = [float(rewards[t]) + gamma * after[t] - float(values[t]) for t in range(length)]
    expected = [math.fsum((gamma * lam) ** k * deltas[t + k] for k in range(length - t)) for t in range(length)]
    advantages, returns = generalized_advantages(rewards, values, gamma=gamma, lam=lam)
    assert advantages.dtype == returns.dtype == np.float32
    np.testing.assert_allclose(advantages, expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(returns, np.array(expected) + values, rtol=1e-6, atol=1e-6)


@UNHURRIED
@given(st.integers(1, 200), st.integers(0, 2**32), FACTORS)
def test_lambda_one_gives_the_discounted_reward_whatever_the_values(length, seed, gamma):
    rewards, values = numbers(seed, length), numbers(seed + 1, length)
    _, returns = generalized_advantages(rewards, values, gamma=gamma, lam=1.0)
    expected = [math.fsum(gamma**k * float(r) for k, r in enumerate(rewards[t:])) for t in range(length)]
    np.testing.assert_allclose(returns, expected, rtol=1e-5, atol=1e-5)


def test_lambda_zero_gives_the_error_of_one_step():
    advantages, returns = generalized_advantages(np.array([0.0, 0, 1]), np.array([0.5, 0.25, 0.75]), gamma=1.0, lam=0.0)
    assert advantages.tolist() == [-0.25, 0.5, 0.25] and returns.tolist() == [0.25, 0.75, 1.0]


def test_the_reward_is_at_the_last_token_and_penalties_at_theirs():
    assert token_rewards(2.0, 3).tolist() == [0.0, 0.0, 2.0]
    assert token_rewards(2.0, 3, np.array([0.5, -0.25, 1.0], np.float32)).tolist() == [-0.5, 0.25, 1.0]
    assert token_rewards(2.0, 0).tolist() == []
    with pytest.raises(ValueError, match="one number a token"):
        generalized_advantages(np.zeros(3), np.zeros(2), gamma=1.0, lam=1.0)


def test_a_long_response_takes_no_time():
    sums = discounted_sums(np.ones(1_000_000), 1.0)
    assert sums[0] == 1_000_000 and sums[-1] == 1


@UNHURRIED
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 2**32))
def test_whitened_advantages_have_mean_zero_and_std_one_over_trained_tokens(lengths, seed):
    advantages = [5 + 3 * numbers(seed + i, n) for i, n in enumerate(lengths)]
    trained = [np.full(n, i % 3 != 1) for i, n in enumerate(lengths)]
    found = whiten(advantages, trained)
    kept, before = (np.concatenate([a[t] for a, t in zip(x, trained, strict=True)]) for x in (found, advantages))
    if len(kept) == 0:
        return
    np.testing.assert_allclose(kept, (before - before.mean()) / (before.std() + 1e-8), rtol=1e-3, atol=1e-4)
    if len(kept) > 1:
        assert kept.mean() == pytest.approx(0, abs=1e-5) and kept.std() == pytest.approx(1, abs=1e-5)
    scale = (before.max() - before.min()) and (kept.max() - kept.min()) / (before.max() - before.min())
    for a, b in zip(advantages, found, strict=True):
        assert b.dtype == np.float32
        if len(a) and scale:
            assert b.max() - b.min() == pytest.approx(scale * (a.max() - a.min()), rel=1e-3, abs=1e-4)


def test_equal_advantages_whiten_to_zero():
    assert all((a == 0).all() for a in whiten([np.full(3, 0.1, np.float32)] * 2, [np.full(3, True)] * 2))


@UNHURRIED
@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(0, 2**32))
def test_explained_variance(lengths, seed):
    returns = [numbers(seed + i, n) for i, n in enumerate(lengths)]
    values = [r + 0.5 * numbers(seed + 100 + i, len(r)) for i, r in enumerate(returns)]
    found, whole, error = explained_variance(returns, values), np.concatenate(returns), np.concatenate(values)
    if len(whole) < 2:
        assert math.isnan(found)
        return
    assert found == pytest.approx(1 - (whole - error).var(dtype=float) / whole.var(dtype=float), rel=1e-4, abs=1e-5)
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(returns, [np.zeros_like(r) for r in returns]) == pytest.approx(0.0, abs=1e-9)


def test_explained_variance_of_nothing_and_of_a_constant_is_unknown():
    assert math.isnan(explained_variance([], [])) and math.isnan(explained_variance([np.ones(3)], [np.zeros(3)]))
