import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.algorithms.estimators import clustered_standard_error, majority_at_k, pass_at_k


@settings(deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=8), st.data())
def test_pass_at_k_is_the_mean_over_all_subsets(right, data):
    k = data.draw(st.integers(1, len(right)))
    expected = np.mean([any(subset) for subset in combinations(right, k)])
    assert pass_at_k([sum(right)], len(right), k)[0] == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_by_the_formula():
    assert pass_at_k([0, 3, 10], 10, 4).tolist() == pytest.approx([0, 1 - math.comb(7, 4) / math.comb(10, 4), 1])
    assert pass_at_k([5], 10, 1)[0] == 0.5
    assert np.isfinite(pass_at_k([1], 100_000, 50_000)).all()


@pytest.mark.parametrize(("right", "samples", "k"), [([1], 4, 0), ([1], 4, 5), ([5], 4, 2), ([-1], 4, 2)])
def test_pass_at_k_refuses_what_makes_no_sense(right, samples, k):
    with pytest.raises(ValueError, match="must be in"):
        pass_at_k(right, samples, k)


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        (["7", "7", "8"], [1, 1, 0], 1.0),
        (["7", "8", "8"], [1, 0, 0], 0.0),
        (["7", "8"], [1, 0], 0.5),  # a tie shares
        (["7", "7", "8", "8", "9"], [0, 0, 1, 1, 0], 0.5),
        ([None, None, None, "7"], [0, 0, 0, 1], 1.0),  # no answer is no vote
        ([None, None], [0, 0], 0.0),
        (["7", "7"], [1, 0], 0.5),  # the grader looked at more than the answer
    ],
)
def test_majority(answers, right, expected):
    assert majority_at_k(answers, right) == expected


def test_the_standard_error_counts_problems_not_samples():
    assert clustered_standard_error([0.0, 1.0, 0.5, 0.5]) == pytest.approx(np.std([0, 1, 0.5, 0.5], ddof=1) / 2)
    # sixteen samples a problem that all agree tell no more than one
    sure = np.repeat([[0.0], [1.0], [1.0]], 16, axis=1)
    assert clustered_standard_error(sure.mean(axis=1)) == pytest.approx(math.sqrt(1 / 3) / math.sqrt(3))
    assert math.isnan(clustered_standard_error([0.5]))
