"""The entropy mechanism: what covariance foretells, and the law between entropy and reward."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.monitoring.entropy_change import entropy_change
from dapo_megatron.monitoring.entropy_law import fit_entropy_law


def row(entropy, covariance, rate=1e-3):
    return {"entropy/mean": entropy, "covariance/mean": covariance, "learning_rate": rate}


def test_a_policy_that_follows_the_mechanism_is_foretold():
    """ΔH = −κ · rate · Cov with κ = 50, the rate changing: the prediction is the change itself."""
    entropy, history = 2.0, []
    for step in range(8):
        now = row(entropy, 0.1 + 0.05 * (step % 3), rate=1e-3 * (step + 1))
        found = entropy_change(history, now)
        assert set(found) == {0: set(), 1: {"entropy/measured_change"}, 2: {"entropy/measured_change"}}.get(
            step, {"entropy/measured_change", "entropy/predicted_change"}
        )
        if step >= 3:
            assert found["entropy/predicted_change"] == pytest.approx(found["entropy/measured_change"])
            assert found["entropy/measured_change"] < 0
        history.append(now)
        entropy -= 50 * now["learning_rate"] * now["covariance/mean"]


def test_the_prediction_looks_at_earlier_steps_alone():
    history = [row(2.0, 0.1), row(1.9, 0.2), row(1.7, 0.1)]
    low, high = (entropy_change(history, row(entropy, 0.1)) for entropy in (0.1, 3.0))
    assert low["entropy/predicted_change"] == high["entropy/predicted_change"] == pytest.approx(-0.1)
    assert low["entropy/measured_change"] == pytest.approx(-1.6)


def test_steps_that_trained_nothing_are_passed_over():
    history = [row(2.0, 0.1), {"tokens/trained": 0.0}, {"entropy/mean": None, "covariance/mean": 0.1}]
    assert entropy_change(history, row(1.5, 0.1)) == {"entropy/measured_change": -0.5}
    assert entropy_change(history, {"tokens/trained": 0.0}) == {}
    assert entropy_change([], row(1.0, 0.1)) == {}


@settings(deadline=None)
@given(st.floats(0.05, 2), st.floats(-1, 2), st.sampled_from([0.2, 0.4]))
def test_the_law_is_found_again(a, b, share):
    entropies = np.linspace(1.5, 0.1, 50)
    law = fit_entropy_law(entropies, -a * np.exp(entropies) + b, share)
    assert (law.a, law.b, law.ceiling) == (pytest.approx(a), pytest.approx(b), pytest.approx(b - a, abs=1e-9))
    assert law.points == 50 * share
    assert law.rest_error == pytest.approx(0, abs=1e-9)


def test_the_error_is_that_of_the_rest():
    entropies = np.linspace(1.0, 0.1, 20)
    rewards = -0.5 * np.exp(entropies) + 1.5
    rewards[8:] += np.where(np.arange(12) % 2, 0.3, -0.3)
    law = fit_entropy_law(entropies, rewards, 0.4)
    assert law.rest_error == pytest.approx(0.3)
    assert law.reward(0.0) == pytest.approx(1.0)


def test_the_fit_is_least_squares():
    generator = np.random.default_rng(1)
    entropies, rewards = generator.uniform(0, 2, 30), generator.uniform(0, 1, 30)
    law = fit_entropy_law(entropies, rewards, 1.0)
    slope, offset = np.polyfit(np.exp(entropies), rewards, 1)
    assert (law.a, law.b) == (pytest.approx(-slope), pytest.approx(offset))
    assert math.isnan(law.rest_error)


@pytest.mark.parametrize(
    ("entropies", "share"),
    [([1.0, 0.9, 0.8, 0.7, 0.6], 0.4), ([0.5] * 20, 0.4), ([], 0.2), ([math.nan] * 15 + [1.0, 0.9], 1.0)],
)
def test_what_says_nothing_is_not_fitted(entropies, share):
    assert fit_entropy_law(entropies, list(range(len(entropies))), share) is None


def test_a_step_without_a_number_is_left_out():
    entropies, rewards = [1.0, math.nan, 0.8, 0.5, 0.1], [0.1, 0.2, math.nan, 0.6, 0.9]
    assert fit_entropy_law(entropies, rewards, 1.0).points == 3
