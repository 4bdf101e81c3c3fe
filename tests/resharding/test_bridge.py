"""Learner ranks and engine workers, two worlds that only a store joins: messages and their mishaps."""

import pytest

from tests.resharding.bridge_cases import LEARNERS, PLACES
from tests.resharding.places import run_places

CASES = "tests.resharding.bridge_cases"
LARGE = {"hidden": 512, "ffn": 2048, "vocab": 4000, "heads": 8, "head_dim": 64}  # more than sockets buffer


@pytest.mark.distributed
def test_shards_reach_the_workers_of_another_world_at_the_byte_minimum_and_without_new_memory():
    wide = {"hidden": 128, "ffn": 640, "vocab": 2000}
    cases = [
        {"dtype": "float32", "bucket_bytes": 1 << 20, "window": 256},
        {"dtype": "float32", "bucket_bytes": 2000, "window": 2},
        {"dtype": "float32", "bucket_bytes": 1 << 17, "window": 3, "sizes": wide},  # direct ones, in several parts
        {"dtype": "bfloat16", "bucket_bytes": 1 << 17, "window": 256, "sizes": wide},  # senders must convert
        {"dtype": "float32", "bucket_bytes": 1 << 16, "window": 5, "sizes": {"kv_heads": 1, "tied": True}},
    ]
    outcomes = run_places(PLACES, f"{CASES}:messages", {"cases": cases})
    for number, case in enumerate(cases):
        found = [outcome.result[number] for outcome in outcomes]
        assert [f["wrong"] for f in found] == [0] * PLACES, case
        minimum = found[0]["minimum"]
        assert sum(f["bytes_sent"] for f in found) == sum(f["bytes_received"] for f in found) == minimum, case
        assert sum(f["messages_sent"] for f in found) == sum(f["messages_received"] for f in found), case
        assert all(f["bytes_received"] == 0 for f in found[:LEARNERS]), case
        assert all(f["bytes_copied"] == 0 for f in found), case
        packed = sum(f["bytes_packed"] for f in found)
        assert 0 < packed <= 2 * minimum, case
        if "sizes" in case and "ffn" in case["sizes"]:
            converted = case["dtype"] == "bfloat16"
            assert (sum(f["bytes_packed"] for f in found[:LEARNERS]) == minimum) == converted, case
            assert sum(f["bytes_packed"] for f in found[LEARNERS:]) < minimum / 2, case
        for f in found:
            first, second = f["fresh"]
            assert second == 0, case
            assert first <= case["bucket_bytes"], case  # the bucket itself
        assert any(f["fresh"][0] for f in found), case


@pytest.mark.distributed
def test_a_place_killed_in_mid_transfer_is_named_and_nobody_waits_for_the_time_limit():
    payload = {"kind": "killed", "culprit": LEARNERS, "sizes": LARGE, "time_limit_s": 300}
    outcomes = run_places(PLACES, f"{CASES}:trouble", payload, time_limit_s=100)
    assert [o.status for o in outcomes] == [0, 0, 0, 0, -9, 0]
    told = [o.result for i, o in enumerate(outcomes) if i != LEARNERS]
    assert all(" lost " in text for text in told), told
    assert any(f"lost place {LEARNERS} to receive" in text for text in told[:LEARNERS]), told


@pytest.mark.distributed
def test_a_learner_rank_killed_in_mid_transfer_is_named_by_the_workers():
    payload = {"kind": "killed", "culprit": 2, "sizes": LARGE, "time_limit_s": 300}
    outcomes = run_places(PLACES, f"{CASES}:trouble", payload, time_limit_s=100)
    told = [o.result for o in outcomes[LEARNERS:]]
    assert outcomes[2].status == -9
    assert any("lost place 2 to send" in text for text in told), told


@pytest.mark.distributed
def test_a_place_that_falls_silent_in_mid_transfer_is_named_when_the_time_is_up():
    payload = {"kind": "silent", "culprit": LEARNERS, "sizes": LARGE, "time_limit_s": 3}
    outcomes = run_places(PLACES, f"{CASES}:trouble", payload, time_limit_s=100)
    told = [o.result for o in outcomes]
    assert all("no error" not in text for text in told), told
    waited = [text for text in told if f"waited 3 s for place {LEARNERS} to receive model." in text]
    assert waited, told


@pytest.mark.distributed
def test_places_that_never_join_are_named():
    told = [o.result for o in run_places(3, f"{CASES}:absent", {"culprit": 2, "places": 3})]
    assert told[:2] == [f"resharding: place {i} waited 1 s for place 2 to join" for i in range(2)]


@pytest.mark.distributed
def test_a_closed_link_is_refused_and_noticed_and_another_can_be_opened():
    first, second = (o.result for o in run_places(2, f"{CASES}:reopened", {}))
    assert first == ["resharding: the link is closed; open a new one under another prefix", str([2.0] * 8)]
    assert second[0].startswith("resharding: ") and "place 0" in second[0] and second[1] == str([1.0] * 8)
