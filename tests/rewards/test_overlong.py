import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.errors import RequestError
from dapo_megatron.rewards import overlong_penalty
from dapo_megatron.rewards.overlong import overlong_penalties


@pytest.mark.parametrize(
    ("length", "penalty"),
    [(0, 0.0), (16384, 0.0), (16385, -1 / 4096), (18432, -0.5), (20479, -4095 / 4096), (20480, -1.0), (20481, -1.0)],
)
def test_published_setting(length: int, penalty: float):
    assert overlong_penalty(length, 20480, 4096) == pytest.approx(penalty, abs=1e-15)


@pytest.mark.parametrize(("length", "penalty"), [(0, 0.0), (100, 0.0), (101, -1.0)])
def test_without_cache_it_is_a_step(length: int, penalty: float):
    assert overlong_penalty(length, 100, 0) == penalty


def test_a_cache_as_long_as_the_limit_starts_at_once():
    assert [overlong_penalty(n, 4, 4) for n in range(6)] == [0.0, -0.25, -0.5, -0.75, -1.0, -1.0]


LIMITS = st.integers(1, 10_000).flatmap(lambda m: st.tuples(st.just(m), st.integers(0, m)))


@given(LIMITS, st.lists(st.integers(0, 12_000), min_size=1))
def test_one_formula_for_one_and_many(limits: tuple[int, int], lengths: list[int]):
    many = overlong_penalties(np.array(lengths), *limits)
    assert many.dtype == np.float64
    assert many.tolist() == [overlong_penalty(length, *limits) for length in lengths]


@given(LIMITS, st.integers(0, 12_000))
def test_bounded_and_never_rising(limits: tuple[int, int], length: int):
    here, next_ = overlong_penalty(length, *limits), overlong_penalty(length + 1, *limits)
    assert -1 <= next_ <= here <= 0
    # above all it is a float a metrics file can hold
    assert type(here) is float


def test_shape_is_kept():
    assert overlong_penalties(np.zeros((3, 4), dtype=np.int32), 10, 5).shape == (3, 4)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ((0, 0), r"reward\.overlong\.max_length=0 .*at least 1"),
        ((10, 11), r"reward\.overlong\.cache_length=11 .*0\.\.max_length=10; use 10"),
        ((10, -1), r"reward\.overlong\.cache_length=-1 .*use 0"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(limits: tuple[int, int], message: str):
    with pytest.raises(RequestError, match=message):
        overlong_penalty(5, *limits)
