"""Chosen tokens against slow formulas: sorted lists, fp64, exact fractions."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.algorithms.keyed_random import keyed_numbers
from dapo_megatron.algorithms.registry import SelectionSettings, TokenValues, token_selections
from dapo_megatron.algorithms.token_selection import choose, covariances, kept_tokens, penalised_tokens

KEY = (7, 3, 1)


@st.composite
def token_values(draw):
    """Few distinct values, so that ties occur."""
    count = draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    entropies = rng.choice([0.0, 0.25, 0.5, 1.0, 2.0], count) if draw(st.booleans()) else rng.exponential(1, count)
    return TokenValues(
        logprobs_N=(-rng.choice([0.01, 0.2, 3.0], count)).astype(np.float32),
        entropies_N=entropies.astype(np.float32),
        advantages_N=rng.choice([-2.0, 0.5, 3.0], count).astype(np.float32),
        clipped_N=rng.random(count) < 0.2,
        samples_N=np.sort(rng.integers(0, 5, count)),
        positions_N=np.arange(count),
    )


def least_one(share, count):
    return max(1, int(Fraction(str(share)) * count))


@settings(max_examples=80, deadline=None)
@given(values=token_values(), ratio=st.sampled_from([0.01, 0.1, 0.2, 0.29, 0.5, 0.8, 1.0]))
def test_entropy_quantiles_are_exact_and_ties_go_by_position(values, ratio):
    for kind, sign in (("high-entropy", -1), ("low-entropy", 1)):
        kept = kept_tokens(values, SelectionSettings(kind, ratio=ratio), KEY)
        order = sorted(range(len(values)), key=lambda i: (sign * values.entropies_N[i], i))
        assert set(np.flatnonzero(kept)) == set(order[: least_one(ratio, len(values))])


@settings(max_examples=40, deadline=None)
@given(values=token_values())
def test_low_probability_keeps_what_is_below_the_threshold(values):
    kept = kept_tokens(values, SelectionSettings("low-probability", threshold=0.9), KEY)
    assert kept.tolist() == [float(np.exp(np.float64(v))) < 0.9 for v in values.logprobs_N]


@settings(max_examples=80, deadline=None)
@given(values=token_values(), share=st.sampled_from([0.002, 0.05, 0.3]))
def test_covariance_and_its_top(values, share):
    a, p = ([float(v) for v in column] for column in (values.advantages_N, values.logprobs_N))
    expected = [(x - sum(a) / len(a)) * (y - sum(p) / len(p)) for x, y in zip(a, p, strict=True)]
    np.testing.assert_allclose(covariances(values), expected, rtol=1e-9, atol=1e-9)
    found = penalised_tokens(values, share)
    assert found.sum() == least_one(share, len(values))
    assert min(np.array(expected)[found]) >= max(np.array(expected)[~found], default=-np.inf) - 1e-9


@settings(max_examples=80, deadline=None)
@given(values=token_values(), share=st.sampled_from([0.0002, 0.05, 0.3]))
def test_clip_cov_draws_from_the_candidates_alone(values, share):
    chosen = SelectionSettings("clip-cov", cov_ratio=share, cov_low=0.1, cov_high=2.0)
    cov = covariances(values)
    candidates = set(np.flatnonzero((cov > 0.1) & (cov < 2.0) & ~values.clipped_N))
    dropped = set(np.flatnonzero(~kept_tokens(values, chosen, KEY)))
    assert dropped <= candidates
    assert len(dropped) == min(least_one(share, len(values)), len(candidates))


def test_clip_cov_draws_the_same_in_any_order_and_anew_for_another_update():
    rng = np.random.default_rng(0)
    count = 400
    columns = {
        "logprobs_N": -rng.exponential(1, count).astype(np.float32),
        "entropies_N": np.zeros(count, np.float32),
        "advantages_N": rng.normal(size=count).astype(np.float32),
        "clipped_N": np.zeros(count, bool),
        "samples_N": np.repeat(np.arange(20), 20),
        "positions_N": np.tile(np.arange(20), 20),
    }
    chosen = SelectionSettings("clip-cov", cov_ratio=0.1, cov_low=0.0, cov_high=9.0)
    order = rng.permutation(count)
    kept = kept_tokens(TokenValues(**columns), chosen, KEY)
    moved = kept_tokens(TokenValues(**{name: column[order] for name, column in columns.items()}), chosen, KEY)
    np.testing.assert_array_equal(moved, kept[order])
    others = [kept_tokens(TokenValues(**columns), chosen, key) for key in ((8, 3, 1), (7, 4, 1), (7, 3, 2))]
    assert all((other != kept).any() for other in others)


def test_keyed_numbers_are_spread_evenly():
    rows, columns = np.divmod(np.arange(1 << 16), 256)
    found = keyed_numbers((0, 0, 0), rows, columns)
    assert len(set(found.tolist())) == len(found)
    bits = (found[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert abs(bits.mean(axis=0) - 0.5).max() < 0.01
    assert abs(np.corrcoef(found.astype(np.float64), rows)[0, 1]) < 0.02
    assert abs(np.corrcoef(found.astype(np.float64), columns)[0, 1]) < 0.02


@settings(max_examples=40, deadline=None)
@given(values=token_values())
def test_penalties_fall_on_kept_tokens_alone(values):
    ((kept, penalised),) = choose([values], SelectionSettings("high-entropy", ratio=0.5, penalised=0.1), KEY)
    assert not (penalised & ~kept).any() and penalised.sum() == least_one(0.1, int(kept.sum()))


def test_parts_are_looked_at_one_by_one():
    def part(entropies):
        count = len(entropies)
        return TokenValues(
            np.zeros(count, np.float32), np.array(entropies, np.float32), np.zeros(count, np.float32),
            np.zeros(count, bool), np.zeros(count, int), np.arange(count),
        )  # fmt: skip

    settings_ = SelectionSettings("high-entropy", ratio=0.5)
    ((whole, _),) = choose([part([1, 2, 3, 4])], settings_, KEY)
    halves = [kept.tolist() for kept, _ in choose([part([1, 2]), part([3, 4])], settings_, KEY)]
    assert whole.tolist() == [False, False, True, True] and halves == [[False, True], [False, True]]
    assert [kept.tolist() for kept, _ in choose([part([])], settings_, KEY)] == [[]]


@pytest.mark.parametrize("kind", token_selections())
def test_every_kind_that_is_listed_is_known(kind):
    values = TokenValues(*(np.zeros(3, t) for t in (np.float32, np.float32, np.float32, bool, int, int)))
    assert kept_tokens(values, SelectionSettings(kind), KEY).shape == (3,)
