"""Learner ranks and engine workers, two worlds that only a store joins: messages and their mishaps."""

import json
from itertools import combinations

import pytest

from dapo_megatron.resharding.bridge import Bridge
from dapo_megatron.resharding.megatron_layout import megatron_layout
from dapo_megatron.resharding.plan import make_plan
from dapo_megatron.resharding.topology import Topology
from dapo_megatron.resharding.vllm_layout import vllm_layout
from tests.resharding.bridge_cases import LEARNERS, PLACES
from tests.resharding.places import run_places
from tests.resharding.worlds import architecture, layout_for

CASES = "tests.resharding.bridge_cases"
LARGE = {"hidden": 512, "ffn": 2048, "vocab": 4000, "heads": 8, "head_dim": 64}  # more than sockets buffer


def _bridge(a=None, layer_spec="local", engines=2, tensor=2, bucket_bytes=1 << 12, **sizes) -> Bridge:
    a = a or architecture()
    layout = layout_for(a, **{"tensor": 2, "pipeline": 2, **sizes})
    homes = tuple(range(engines * tensor))
    machines = tuple(rank * 2 // layout.world for rank in range(layout.world))
    return Bridge(
        architecture=a, layout=layout, layer_spec=layer_spec, engines=engines, tensor=tensor, dtype="float32",
        transport="relay", window=32, time_limit_s=60, topology=Topology(machines, homes),
        bucket_bytes=bucket_bytes,
    )  # fmt: skip


def test_a_bridge_plans_once_however_often_it_is_met_and_for_all_it_depends_on():
    bridge, known = _bridge(), []
    a, layout = bridge.architecture, bridge.layout
    source, target = megatron_layout(a, layout), vllm_layout(a, engines=2, tensor=2, first_rank=4)
    assert bridge.plan == make_plan(source, target, bridge.topology) and bridge.rounds
    again = Bridge.from_json(json.loads(json.dumps(bridge.to_json())))  # as a worker meets it
    assert again.plan is bridge.plan and again.rounds is bridge.rounds
    for changes in (
        {}, {"a": architecture(vocab=65)}, {"a": architecture("qwen3")}, {"layer_spec": "transformer_engine"},
        {"engines": 1}, {"tensor": 1}, {"pipeline": 1, "data": 2}, {"data": 2},
    ):  # fmt: skip
        known.append(_bridge(**changes).plan)
    assert all(one != other for one, other in combinations(known, 2))
    assert _bridge(bucket_bytes=1 << 11).rounds != bridge.rounds


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
