"""Numbers of calibration against plain definitions."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dapo_megatron.judging.agreement import (
    area_under_curve,
    as_json,
    expected_calibration_error,
    likeness,
    quality,
    reliability,
)

SHARES = st.lists(st.tuples(st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.55, 0.9, 1.0]), st.booleans()), max_size=30)


def arrays(rows: list[tuple[float, bool]]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([p for p, _ in rows], float), np.array([truth for _, truth in rows], bool)


@given(SHARES)
def test_auc_is_the_chance_that_a_yes_is_above_a_no(rows):
    p, truth = arrays(rows)
    pairs = [(a > b) + 0.5 * (a == b) for a in p[truth] for b in p[~truth]]
    found = area_under_curve(p, truth)
    assert math.isnan(found) if not pairs else found == pytest.approx(np.mean(pairs))


@given(SHARES)
def test_bins(rows):
    p, truth = arrays(rows)
    found = reliability(p, truth)
    assert found.counts.sum() == len(rows)
    error = 0.0
    for i in range(10):
        inside = [(a, t) for a, t in rows if min(int(a * 10), 9) == i]
        assert found.counts[i] == len(inside)
        if inside:
            mean, share = np.mean([a for a, _ in inside]), np.mean([t for _, t in inside])
            assert (found.mean_p[i], found.share[i]) == (pytest.approx(mean), pytest.approx(share))
            error += len(inside) / len(rows) * abs(mean - share)
    assert expected_calibration_error(p, truth) == pytest.approx(error)


@given(SHARES)
def test_a_judge_that_knows_is_perfect_and_its_opposite_is_not(rows):
    _, truth = arrays(rows)
    assume(0 < truth.sum() < len(truth))
    knows = quality(truth.astype(float), truth)
    assert (knows.accuracy, knows.auc, knows.brier, knows.ece) == (1, 1, 0, 0)
    wrong = quality(1 - truth.astype(float), truth)
    assert (wrong.accuracy, wrong.auc, wrong.brier, wrong.ece) == (0, 0, 1, pytest.approx(1))


def test_likeness():
    found = likeness(np.array([0.9, 0.6, 0.1]), np.array([0.8, 0.4, 0.2]))
    assert (found.equal, found.difference) == (pytest.approx(2 / 3), pytest.approx(0.4 / 3))
    assert found.correlation == pytest.approx(np.corrcoef([0.9, 0.6, 0.1], [0.8, 0.4, 0.2])[0, 1])
    assert math.isnan(likeness(np.ones(2), np.array([0.0, 1.0])).correlation)
    assert as_json(likeness(np.empty(0), np.empty(0))) == {
        "cases": 0, "equal": None, "difference": None, "correlation": None,
    }  # fmt: skip
    assert as_json(quality(np.empty(0), np.empty(0, bool)))["accuracy"] is None
