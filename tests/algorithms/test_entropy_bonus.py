"""The coefficient of an adaptive entropy bonus, step by step."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.algorithms.entropy_bonus import adapted

SETTINGS = {"target": 0.2, "delta": 0.005, "most": 0.02}


@given(
    entropies=st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3, 5.0]), min_size=1, max_size=40), start=st.floats(0, 0.02)
)
def test_it_rises_below_the_target_and_falls_at_and_above_it(entropies, start):
    coefficient = expected = start
    for entropy in entropies:
        bonus = adapted(coefficient, entropy, **SETTINGS)
        assert bonus.applied == (coefficient if entropy <= 0.2 else 0.0)
        expected += 0.005 if entropy < 0.2 else -0.005
        expected = sorted((0.0, expected, 0.02))[1]
        assert bonus.following == pytest.approx(expected, abs=1e-12)
        assert 0 <= bonus.applied <= 0.02
        coefficient = bonus.following


def test_a_coefficient_from_before_a_lower_bound_is_cut():
    bonus = adapted(0.5, 0.1, **SETTINGS)
    assert (bonus.applied, bonus.following) == (0.02, 0.02)
