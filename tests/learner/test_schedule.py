"""Learning rates of a step, by hand."""

import math

import pytest

from dapo_megatron.learner.optimizer import scheduled_rate


def test_warm_up_reaches_the_peak_at_its_last_step():
    rates = [scheduled_rate(step, 100, peak=1e-3, warmup=4) for step in range(6)]
    assert rates == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])


def test_linear_and_cosine_end_at_the_least():
    for schedule in ("linear", "cosine"):
        assert scheduled_rate(10, 110, peak=1.0, least=0.1, warmup=10, schedule=schedule) == pytest.approx(1.0)
        assert scheduled_rate(110, 110, peak=1.0, least=0.1, warmup=10, schedule=schedule) == pytest.approx(0.1)
    assert scheduled_rate(60, 110, peak=1.0, least=0.1, warmup=10, schedule="linear") == pytest.approx(0.55)
    quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    assert scheduled_rate(35, 110, peak=1.0, least=0.1, warmup=10, schedule="cosine") == pytest.approx(quarter)
