"""Pipes by which two processes of a machine take turns."""

import json
import os
import time

import pytest

from dapo_megatron.errors import RunError
from dapo_megatron.resharding.turns import Offer, PeerGone, PeerLate, first_to_speak, open_turns


def soon() -> float:
    return time.monotonic() + 0.01


def later() -> float:
    return time.monotonic() + 30


@pytest.fixture
def pair():
    offer = Offer()
    other = open_turns(json.loads(json.dumps(offer.describe())))
    offer.taken()
    yield offer, other
    offer.close()
    other.close()


def test_each_hears_every_word_of_the_other_once(pair):
    offer, other = pair
    offer.turns.tell()
    offer.turns.tell()
    other.hear(later())
    other.tell()
    other.hear(later())
    offer.turns.hear(later())
    for turns in (offer.turns, other):
        with pytest.raises(PeerLate):
            turns.hear(soon())


def test_the_end_of_either_side_is_noticed_behind_its_last_word(pair):
    offer, other = pair
    offer.turns.tell()
    offer.close()
    other.hear(later())
    with pytest.raises(PeerGone):
        other.hear(later())
    with pytest.raises(PeerGone):
        other.tell()


def test_the_end_of_the_one_who_opened_is_noticed(pair):
    offer, other = pair
    other.close()
    with pytest.raises(PeerGone):
        offer.turns.hear(later())
    with pytest.raises(PeerGone):
        offer.turns.tell()


def test_of_several_the_one_that_speaks_is_found(pair):
    offer, other = pair
    silent = Offer()
    both = {5: silent.turns, 7: other}
    assert first_to_speak(both, soon()) is None
    offer.turns.tell()
    assert first_to_speak(both, later()) == 7
    silent.close()


def test_pipes_that_are_gone_or_others_by_now_are_told():
    offer = Offer()
    described = offer.describe()
    forged = {**described, "ends": [[number, inode + 1] for number, inode in described["ends"]]}
    with pytest.raises(RunError, match=rf"the pipes of process {os.getpid()} cannot be opened \(it is another process"):
        open_turns(forged)
    offer.close()
    with pytest.raises(RunError, match="it has ended, runs on another machine"):
        open_turns(described)
