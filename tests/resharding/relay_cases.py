"""Run on places: learner ranks at TP2 × PP2 (places 0–3) on pretended machines, and four workers beside them (4–7)."""

import json
import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_megatron.errors import RunError
from dapo_megatron.resharding import relay as relay_module
from dapo_megatron.resharding.bridge import Bridge
from dapo_megatron.resharding.relay import Relay
from dapo_megatron.resharding.relay_taker import RelayTaker
from dapo_megatron.resharding.shared_memory import Puller, export_tensors, open_export
from dapo_megatron.resharding.topology import topology_of
from dapo_megatron.resharding.turns import Turns
from dapo_megatron.resharding.vllm_layout import vllm_local_shapes
from tests.resharding.bridge_cases import UNTOUCHED, TroubledLink
from tests.resharding.worlds import architecture, layout_for, numbered, shards

LEARNERS = 4
CPU = torch.device("cpu")


class Scene:
    """One place of a bridge: its tensors, and the waiting for the others that `EngineSync` does elsewhere."""

    def __init__(self, store: dist.Store, place: int, name: str, **case: Any) -> None:
        self.store, self.place, self.name = dist.PrefixStore(name, store), place, name
        a = architecture(**case.get("sizes", {}))
        layout = layout_for(a, tensor=2, pipeline=2)
        machines, engines, tensor = case["machines"], case["engines"], case["tensor"]
        owners = [e * LEARNERS // engines for e in range(engines)]
        self.bridge = Bridge(
            architecture=a, layout=layout, layer_spec="local", engines=engines, tensor=tensor,
            dtype=case.get("dtype", "float32"), transport="relay", bucket_bytes=case.get("bucket_bytes", 1 << 20),
            window=case.get("window", 256), time_limit_s=case.get("time_limit_s", 120.0),
            topology=topology_of(machines, owners, tensor=tensor, devices=True),
        )  # fmt: skip
        self.bridge = Bridge.from_json(json.loads(json.dumps(self.bridge.to_json())))  # as a worker gets it
        self.source: dict[str, Tensor] = {}
        self.target: dict[str, Tensor] = {}
        held = getattr(torch, case.get("held", "float32"))
        if place < LEARNERS:
            mine = shards(a, layout, numbered(a))[place]
            self.source = {key: tensor.to(held) for key, tensor in mine.items()}
        else:
            shapes = vllm_local_shapes(a, tensor)
            self.target = {key: torch.full(shape, UNTOUCHED, dtype=self.bridge.torch_dtype)
                           for key, shape in shapes.items()}  # fmt: skip

    def meet(self) -> Relay | RelayTaker:
        """This place's part of the bridge, once all have theirs."""
        bridge, place = self.bridge, self.place
        if place < LEARNERS:
            self.export = export_tensors(self.source)
            self.store.set(f"export/{place}", json.dumps(self.export.describe()))
            relay = bridge.open_relay(self.store, place, device=CPU, prefix="ranks")
            self.store.set(f"relay/{place}", json.dumps(relay.describe()))
            self.all_at("joined")
            relay.joined()
            return relay
        opened = {rank: open_export(self.told("export", rank)) for rank in bridge.sources_of(place)}
        relays = {rank: self.told("relay", rank) for rank in bridge.relays_of(place)}
        taker = RelayTaker(
            bridge.plan, bridge.rounds, place, bridge.topology, opened, relays, self.target,
            dtype=bridge.torch_dtype, time_limit_s=bridge.time_limit_s,
        )  # fmt: skip
        self.all_at("joined")
        return taker

    def told(self, what: str, rank: int) -> dict[str, Any]:
        return json.loads(self.store.get(f"{what}/{rank}"))

    def all_at(self, where: str) -> None:
        """Wait until every place has come here."""
        self.store.set(f"{where}/{self.place}", "yes")
        self.store.wait([f"{where}/{i}" for i in range(self.bridge.places)])

    def by_other_ways(self) -> dict[str, dict[str, Tensor]]:
        """What the target holds after the same weights came by messages, and out of everybody's memory."""
        bridge, found = self.bridge, {}
        for way in ("group", "shared"):
            fresh = {key: torch.full_like(tensor, UNTOUCHED) for key, tensor in self.target.items()}
            if way == "group":
                transport = bridge.open_transport(self.store, self.place, device=CPU, prefix="messages")
                transport.run(self.source, fresh)
                transport.close()
            elif fresh:
                opened = {rank: open_export(self.told("export", rank)) for rank in range(LEARNERS)}
                Puller(bridge.plan, self.place, opened, fresh, dtype=bridge.torch_dtype).run()
            self.all_at(way)
            found[way] = fresh
        return found


def carried(store: dist.Store, place: int, payload: dict) -> list[dict]:
    """Every case twice, with other weights: what this place counted, and whether all ways led to the same weights."""
    return [_carried(Scene(store, place, f"case {i}", **case)) for i, case in enumerate(payload["cases"])]


def _carried(scene: Scene) -> dict[str, Any]:
    found: dict[str, Any] = {"held": []}
    part = scene.meet()
    for version in range(2):
        scene.all_at(f"ready {version}")
        if isinstance(part, Relay):
            transfer = part.run(scene.source)
            found["held"].append(part.held_bytes)
        else:
            transfer = part.run()
        scene.all_at(f"done {version}")
        if version == 0:
            for tensor in scene.source.values():
                tensor += 1
    others = scene.by_other_ways()
    found["same"] = all(
        torch.equal(tensor.view(torch.uint8), others[way][key].view(torch.uint8))
        for way in others for key, tensor in scene.target.items()
    )  # fmt: skip
    found["filled"] = sum(int((tensor != UNTOUCHED).sum()) for tensor in scene.target.values())
    part.close()
    return {**found, **vars(transfer)}


class TroubledTurns(Turns):
    """Turns whose owner does `trouble` instead of hearing of a round."""

    def hear(self, deadline: float) -> None:
        self.trouble()
        super().hear(deadline)


def troubles(store: dist.Store, place: int, payload: dict) -> list[str]:
    """What this place is told in each case, if it is still there: an error, or how many bytes it got."""
    found = []
    for number, case in enumerate(payload["cases"]):
        if place < LEARNERS + case["engines"] * case["tensor"]:
            found.append(_trouble(Scene(store, place, f"trouble {number}", **case), case))
    return found


def _trouble(scene: Scene, case: dict[str, Any]) -> str:
    relay_module.PATIENCE = case.get("patience", relay_module.PATIENCE)
    part = scene.meet()
    others = [f"told/{i}" for i in range(scene.bridge.places) if i != case["culprit"]]

    def until_all_are_told() -> None:
        deadline = time.monotonic() + 60
        while not scene.store.check(others) and time.monotonic() < deadline:
            time.sleep(0.02)

    def happen() -> None:
        if case["kind"] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        until_all_are_told()

    if scene.place == case["culprit"]:
        if isinstance(part, Relay):
            part.link = TroubledLink(part.link, happen)
        else:
            for rank, turns in part._turns.items():
                part._turns[rank] = TroubledTurns(turns.inward, turns.outward)
                part._turns[rank].trouble = happen
    scene.all_at("ready")
    try:
        transfer = part.run(scene.source) if isinstance(part, Relay) else part.run()
        told = f"{transfer.bytes_received} bytes"
    except RunError as error:
        told = str(error)
    scene.store.set(f"told/{scene.place}", "yes")
    until_all_are_told()  # the end of this part must not be what the others notice
    part.close()
    return told
