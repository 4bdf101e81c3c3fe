"""Weights that cross machines once each: real ranks and workers on pretended machines."""

import pytest

from tests.resharding.places import run_places
from tests.resharding.relay_cases import LEARNERS

CASES = "tests.resharding.relay_cases"
WIDE = {"hidden": 64, "ffn": 320, "vocab": 1000, "heads": 8, "kv_heads": 4, "head_dim": 8}
SLOTS_BY_MACHINE = ([0, 0, 1, 1], [0, 1, 0, 1])


@pytest.mark.distributed
def test_weights_are_the_same_by_every_way_and_memory_stays_within_the_bucket():
    cases = [
        {"machines": [0, 0, 1, 1], "engines": 4, "tensor": 1, "bucket_bytes": 1 << 20},
        {"machines": [0, 0, 1, 1], "engines": 2, "tensor": 2, "bucket_bytes": 1 << 14, "sizes": WIDE},
        {"machines": [0, 1, 0, 1], "engines": 4, "tensor": 1, "bucket_bytes": 3000, "window": 2},
        # senders convert, and a worker holds one kv head twice
        {"machines": [0, 0, 1, 1], "engines": 2, "tensor": 2, "bucket_bytes": 1 << 14, "dtype": "bfloat16",
         "sizes": {**WIDE, "kv_heads": 2, "tied": True}},
        {"machines": [0, 1, 2, 3], "engines": 4, "tensor": 1, "bucket_bytes": 1 << 14, "dtype": "bfloat16",
         "held": "bfloat16", "sizes": WIDE},
        {"machines": [0, 0, 0, 0], "engines": 2, "tensor": 2},  # nothing to relay
    ]  # fmt: skip
    outcomes = run_places(8, f"{CASES}:carried", {"cases": cases})
    for number, case in enumerate(cases):
        found = [outcome.result[number] for outcome in outcomes]
        ranks, workers = found[:LEARNERS], found[LEARNERS:]
        assert all(f["same"] for f in found), case
        itemsize = 2 if case.get("dtype") == "bfloat16" else 4
        assert sum(f["bytes_received"] for f in workers) == itemsize * sum(f["filled"] for f in workers), case
        sent = sum(f["bytes_sent"] for f in ranks)
        assert sent == sum(f["bytes_received"] for f in ranks), case
        assert (sent > 0) == (len(set(case["machines"])) > 1), case
        for f in ranks:
            first, second = f["held"]
            assert first == second <= case.get("bucket_bytes", 0), case
        assert sent == 0 or max(f["held"][0] for f in ranks) > 0, case


@pytest.fixture(scope="module")
def troubled() -> list[dict[int, str]]:
    """What was told in each case, by place: workers 4 and 5 stand on machine 0, 6 and 7 on machine 1."""
    shape = {"machines": [0, 0, 1, 1], "tensor": 1, "bucket_bytes": 1 << 16, "sizes": WIDE, "window": 8}
    cases = [
        {"kind": "silent", "culprit": 7, "engines": 4, "time_limit_s": 40, "patience": 0.2, **shape},
        {"kind": "killed", "culprit": 7, "engines": 4, "time_limit_s": 300, **shape},
        {"kind": "killed", "culprit": 3, "engines": 2, "time_limit_s": 300, **shape},  # workers 4 and 5 alone
    ]
    outcomes = run_places(8, f"{CASES}:troubles", {"cases": cases})
    assert [outcome.status for outcome in outcomes] == [0, 0, 0, -9, 0, 0, 0, -9]
    lists = [outcome.result or [] for outcome in outcomes]
    return [{place: told[i] for place, told in enumerate(lists) if i < len(told)} for i in range(len(cases))]


@pytest.mark.distributed
def test_a_silent_worker_is_named_and_left_behind_and_a_killed_one_too(troubled):
    for told, words in zip(troubled, ("within 8 s", "is gone"), strict=False):
        named = [text for text in told.values() if text.startswith("resharding: place 7, served by place ")]
        assert named and all(words in text for text in named), told
        others = [text for place, text in told.items() if place in (4, 5, 6)]
        assert len(set(others)) == 1 and others[0].endswith(" bytes"), told  # all of their weights


@pytest.mark.distributed
def test_a_rank_killed_in_mid_transfer_is_named_and_nobody_waits_for_the_time_limit(troubled):
    told = troubled[2]
    assert all(" lost place " in text for text in told.values()) and len(told) == 5, told
    assert any("lost place 3 to " in text for text in told.values()), told
