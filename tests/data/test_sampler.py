import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.data.sampler import PromptSampler
from dapo_megatron.errors import RequestError

SIZES, SEEDS, TAKES = st.integers(1, 40), st.integers(0, 2**32), st.lists(st.integers(0, 90), max_size=6)


@given(SIZES, SEEDS, st.booleans(), TAKES)
def test_how_the_taking_is_cut_does_not_matter(size: int, seed: int, shuffle: bool, takes: list[int]):
    whole = PromptSampler(size, seed, shuffle).take(sum(takes))
    sampler = PromptSampler(size, seed, shuffle)
    parts = [sampler.take(n) for n in takes]
    assert whole.dtype == np.int64
    assert [len(part) for part in parts] == takes
    assert np.concatenate([whole[:0], *parts]).tolist() == whole.tolist()


@given(SIZES, SEEDS, st.booleans(), st.integers(1, 4))
def test_every_epoch_is_a_permutation(size: int, seed: int, shuffle: bool, epochs: int):
    taken = PromptSampler(size, seed, shuffle).take(size * epochs).reshape(epochs, size)
    assert (np.sort(taken, axis=1) == np.arange(size)).all()
    if not shuffle:
        assert (taken == np.arange(size)).all()


@given(SIZES, SEEDS, st.booleans(), st.integers(0, 100), st.integers(0, 100))
def test_resume_is_exact(size: int, seed: int, shuffle: bool, before: int, after: int):
    sampler = PromptSampler(size, seed, shuffle)
    sampler.take(before)
    state = json.loads(json.dumps(sampler.state()))
    resumed = PromptSampler(size, seed, shuffle)
    resumed.load_state(state)
    assert resumed.take(after).tolist() == sampler.take(after).tolist()


def test_epochs_and_seeds_differ():
    epochs = PromptSampler(100, 1, True).take(200).reshape(2, 100)
    assert epochs[0].tolist() != epochs[1].tolist()
    assert epochs[0].tolist() != PromptSampler(100, 2, True).take(100).tolist()
    # (seed, epoch) is no sum: epoch 1 of seed 1 is not epoch 0 of seed 2
    assert epochs[1].tolist() != PromptSampler(100, 2, True).take(100).tolist()


def test_what_was_taken_is_the_callers_own():
    sampler = PromptSampler(10, 0, True)
    expected = PromptSampler(10, 0, True).take(10).tolist()
    sampler.take(4)[:] = -1
    assert sampler.take(6).tolist() == expected[4:]


def test_an_empty_data_set_is_refused():
    with pytest.raises(RequestError, match="empty"):
        PromptSampler(0, 0, True)


def test_a_state_of_another_data_set_is_refused():
    state = PromptSampler(10, 0, True).state()
    with pytest.raises(RequestError, match=r"data.train rows=9, .*written with 10"):
        PromptSampler(9, 0, True).load_state(state)
    with pytest.raises(
        RequestError, match=r"run.seed=1, .*written with 0.*\n.*data.shuffle=False, .*written with True"
    ):
        PromptSampler(10, 1, False).load_state(state)
