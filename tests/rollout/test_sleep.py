"""Engines on the learner's own GPUs: who holds memory when, with stand-ins for the engines and for the card."""

import json
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from dapo_megatron import engine_sync
from dapo_megatron.config import load_recipe
from dapo_megatron.device_memory import held_on_card
from dapo_megatron.engine_sync import EngineSync
from dapo_megatron.errors import RunError
from dapo_megatron.resharding.bridge import Bridge
from dapo_megatron.rollout.fleet import Fleet
from dapo_megatron.rollout.vllm_client import EngineFailed
from tests.command_line import RECIPE
from tests.resharding.worlds import architecture, layout_for, numbered, shards
from tests.rollout.test_fleet import FakeEngine

LIMIT_S = 20.0
GIB = 1 << 30


class SleepingEngine(FakeEngine):
    """Answers as vLLM's server and its one worker do; refuses what would fail on a GPU. `asleep`: as vLLM names it."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.asleep: set[str] = set()
        self.weights_of: str | None = None  # the update that has filled them
        self.paused = True
        self.faults: list[str] = []  # routes that fail once
        self.without_cache: list[bool] = []  # whether weights came before the KV cache had its memory back
        self.learner_gib: list[float] = []  # what the learner's allocator kept whenever this one took memory

    async def post(self, path: str, body=None, *, time_limit_s: float):
        self.posts.append((path, body))
        if path in self.faults:
            self.faults.remove(path)
            raise EngineFailed(f"{self.address} is gone")
        if path.startswith("/init_weight"):
            info = body["init_info"]
            self.store = dist.TCPStore(info["host"], info["port"], is_master=False, timeout=timedelta(seconds=LIMIT_S))
            self.epoch = info["epoch"]
            self._tell("joined", {})
        elif path == "/sleep?level=2":
            self.asleep, self.weights_of, self.paused = {"weights", "kv_cache"}, None, True
        elif path.startswith("/wake_up?tags="):
            self.learner_gib.append(torch.cuda.memory_reserved() / GIB)
            self.asleep.discard(path.split("=")[1])
            self.paused = self.paused and bool(self.asleep)  # whoever is all awake goes on
        elif path == "/pause?mode=keep":
            self.paused = True
        elif path == "/update_weights":
            assert "weights" not in self.asleep, "weights were written while there was no memory for them"
            assert self.paused, "weights were written while tokens may be drawn"
            self.without_cache.append("kv_cache" in self.asleep)
            self.weights_of = body["update_info"]["uid"]
            self._tell(f"done/{self.weights_of}", {"bytes": 4, "seconds": 0.0})
        elif path == "/resume":
            assert not self.asleep and self.weights_of is not None, "resumed without memory or weights"
            self.paused = False
        return {"success": True} if path.startswith("/reset_prefix_cache") else None

    def _tell(self, key: str, answer: dict) -> None:
        self.store.set(f"{self.epoch}/{key}/1", json.dumps({"error": None, **answer}))

    def routes(self) -> list[str]:
        """The routes asked for since the last call."""
        found, self.posts = [path for path, _ in self.posts], []
        return found


class Engines:
    """`VLLMEngines` of one rank; a restart brings the next stand-in."""

    rank, world, host, sleep = 0, 1, "127.0.0.1", True

    def __init__(self) -> None:
        self.made = [SleepingEngine("first"), SleepingEngine("second")]
        by_address = {engine.address: engine for engine in self.made}
        self.fleet = Fleet(by_address.__getitem__, ["first"], capacity=4, time_limit_s=LIMIT_S)
        self.restarts = 0

    def ready(self) -> None: ...

    def ended(self) -> dict[int, str]:
        return {}

    def restart(self, engines, reasons) -> None:
        self.restarts += 1
        self.fleet.replace(0, "second")


class Card:
    """torch.cuda as far as it is asked here: the learner keeps 30 GiB until it gives them back."""

    def __init__(self) -> None:
        self.reserved_gib, self.calls = 30.0, []

    def memory_reserved(self, device=None) -> int:
        return int(self.reserved_gib * GIB)

    def empty_cache(self) -> None:
        self.calls.append("empty_cache")
        self.reserved_gib = 5.0

    def synchronize(self, device=None) -> None:
        self.calls.append("synchronize")

    def mem_get_info(self, device=None) -> tuple[int, int]:
        return int((80 - self.reserved_gib - 2.5) * GIB), 80 * GIB


@pytest.fixture
def card(monkeypatch) -> Card:
    card = Card()
    for name in ("memory_reserved", "empty_cache", "synchronize", "mem_get_info"):
        monkeypatch.setattr(torch.cuda, name, getattr(card, name))
    return card


@pytest.fixture
def scene(card, monkeypatch) -> Iterator[SimpleNamespace]:
    """(engines, make: recipe settings → EngineSync) over a learner of one rank that claims to be on a GPU."""
    monkeypatch.setattr(
        engine_sync, "export_tensors", lambda _: SimpleNamespace(describe=dict, still_valid=lambda _: True)
    )
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    a = architecture()
    layout = layout_for(a)
    weights = {key: tensor.float() for key, tensor in shards(a, layout, numbered(a))[0].items()}
    learner = SimpleNamespace(device=torch.device("cuda", 0), weights=weights)
    bridge = Bridge(
        architecture=a, layout=layout, layer_spec="local", engines=1, tensor=1, dtype="float32", transport="shared",
        bucket_bytes=1 << 18, window=8, time_limit_s=LIMIT_S,
    )  # fmt: skip
    engines, made = Engines(), []

    def make(*settings: str) -> EngineSync:
        recipe = load_recipe(RECIPE, ["resharding.verify=never", f"resharding.time_limit_s={LIMIT_S}", *settings])
        made.append(EngineSync(recipe, learner, engines, bridge))
        return made[-1]

    yield SimpleNamespace(engines=engines, make=make)
    engines.fleet.close()
    for sync in made:
        sync.close()
    dist.destroy_process_group()


UPDATE = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
FINISH = ["/update_weight_version", "/reset_prefix_cache?reset_running_requests=true"]


def test_engine_and_learner_take_turns_on_the_card(scene, card):
    sync, engine = scene.make(), scene.engines.made[0]
    sync.push(0)
    assert engine.routes() == ["/init_weight_transfer_engine", "/pause?mode=keep", *UPDATE, *FINISH, "/resume"]
    assert "empty_cache" not in card.calls, "nobody waits for memory yet"
    for step in (1, 2):
        sync.give_way()
        assert engine.routes() == ["/sleep?level=2"] and engine.asleep == {"weights", "kv_cache"}
        card.reserved_gib = 30.0  # the learner has learnt
        transfer = sync.push(step)
        assert transfer.bytes_sent == 4 and not engine.asleep and not engine.paused
        # the KV cache, which takes most, comes last; one meeting serves all steps
        assert engine.routes() == [
            "/wake_up?tags=weights", "/pause?mode=keep", *UPDATE, *FINISH, "/wake_up?tags=kv_cache", "/resume",
        ]  # fmt: skip
    assert engine.without_cache == [False, True, True]
    assert engine.learner_gib == [5.0] * 4, "the learner gives back what it keeps before an engine takes memory"
    assert scene.engines.restarts == 0


@pytest.mark.parametrize("route", ["/sleep?level=2", "/wake_up?tags=weights", "/wake_up?tags=kv_cache"])
def test_an_engine_that_dies_on_the_way_is_replaced_and_filled(scene, route):
    """Its successor is awake from the start."""
    sync, (first, second) = scene.make(), scene.engines.made
    sync.push(0)
    first.faults.append(route)
    sync.give_way()
    sync.push(1)
    assert scene.engines.restarts == 1 and first.closed
    assert second.weights_of is not None and not second.asleep and not second.paused
    sync.give_way()
    assert second.asleep
    sync.push(2)
    assert not second.asleep and not second.paused and sync.version == 2


@pytest.mark.parametrize("enabled", ["true", "false"])
def test_engines_without_weights_yet_give_way_to_a_warm_start(scene, card, enabled):
    sync, engine = scene.make(f"resharding.enabled={enabled}"), scene.engines.made[0]
    sync.give_way()
    assert engine.routes() == ["/sleep?level=2"]
    sync.push(0)
    assert not engine.asleep and not engine.paused and engine.weights_of is not None
    assert engine.learner_gib == [5.0] * 2, "the learner gives back what it keeps before an engine takes memory"


def test_engines_that_keep_their_first_weights_stay_awake(scene):
    sync, engine = scene.make("resharding.enabled=false"), scene.engines.made[0]
    sync.push(0)
    engine.routes()
    sync.give_way()
    assert sync.push(1) is None and engine.routes() == []
    with pytest.raises(RunError, match="cannot get the run's first weights again"):
        sync.refill()


def test_engines_on_devices_of_their_own_stay_awake(scene):
    scene.engines.sleep = False
    sync, engine = scene.make(), scene.engines.made[0]
    sync.push(0)
    sync.give_way()
    sync.push(1)
    assert not [path for path in engine.routes() if "sleep" in path or "wake" in path]


def test_what_either_side_leaves_on_the_card_is_told(card):
    card.reserved_gib = 5.0
    assert held_on_card(torch.device("cuda", 0), "learn") == {
        "memory/learn/learner_gib": 5.0, "memory/learn/others_gib": 2.5,
    }  # fmt: skip
    assert held_on_card(torch.device("cpu"), "learn") == {}
