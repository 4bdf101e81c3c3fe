"""Run on places: learner ranks at TP2 × PP2 (places 0–3) give their shards to an engine of two workers (4 and 5)."""

import json
import os
import signal
import time
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dapo_megatron.errors import RunError
from dapo_megatron.resharding.layout import volume
from dapo_megatron.resharding.links import Link, Operation, Pending, await_all, open_link
from dapo_megatron.resharding.megatron_layout import megatron_layout
from dapo_megatron.resharding.plan import Plan, make_plan
from dapo_megatron.resharding.shared_memory import Puller, export_tensors, open_export
from dapo_megatron.resharding.transport import Transfer, Transport
from dapo_megatron.resharding.vllm_layout import vllm_layout, vllm_local_shapes, worker_placements
from tests.resharding.worlds import architecture, layout_for, numbered, shards

LEARNERS, WORKERS = 4, 2
PLACES = LEARNERS + WORKERS
UNTOUCHED = -7.0
CPU = torch.device("cpu")
ADDRESS: dict[str, Any] = {"device": CPU, "time_limit_s": 30.0}


class Scene:
    """One model at both ends, and what each place holds of it."""

    def __init__(self, place: int, dtype: torch.dtype = torch.float32, **sizes: Any) -> None:
        self.place = place
        self.architecture = architecture(**sizes)
        self.layout = layout_for(self.architecture, tensor=2, pipeline=2)
        target = vllm_layout(self.architecture, engines=1, tensor=WORKERS, first_rank=LEARNERS)
        self.plan: Plan = make_plan(megatron_layout(self.architecture, self.layout), target)
        self.whole = {name: tensor.float() for name, tensor in numbered(self.architecture).items()}
        self.elements = sum(volume(p.box) for placed in target.placements.values() for p in placed)
        self.source: dict[str, Tensor] = {}
        self.target: dict[str, Tensor] = {}
        if place < LEARNERS:
            mine = shards(self.architecture, self.layout, numbered(self.architecture))[place]
            self.source = {key: tensor.float() for key, tensor in mine.items()}
        else:
            shapes = vllm_local_shapes(self.architecture, WORKERS)
            self.target = {key: torch.full(shape, UNTOUCHED, dtype=dtype) for key, shape in shapes.items()}

    def change(self) -> None:
        """A training step: every weight grows by one."""
        for tensor in self.source.values():
            tensor += 1

    def wrong(self, version: int) -> int:
        """Elements of this place's targets that are not the canonical ones of `version`, or not untouched padding."""
        if self.place < LEARNERS:
            return 0
        expected = {key: torch.full_like(tensor, UNTOUCHED) for key, tensor in self.target.items()}
        for p in worker_placements(self.architecture, WORKERS, self.place - LEARNERS):
            inside = tuple(slice(start, start + size) for start, size in zip(p.offset, p.shape, strict=True))
            box = tuple(slice(*edge) for edge in p.box)
            expected[p.key][inside] = (self.whole[p.name][box] + version).to(expected[p.key].dtype)
        return sum(int((self.target[key] != tensor).sum()) for key, tensor in expected.items())


def transport(scene: Scene, link: Link, **options: Any) -> Transport:
    defaults = {"dtype": torch.float32, "bucket_bytes": 1 << 20, "window": 256, "time_limit_s": 30.0}
    return Transport(scene.plan, scene.place, device=CPU, link=link, **{**defaults, **options})


def messages(store: dist.Store, place: int, payload: dict) -> list[dict]:
    """Every case twice, with other weights; the learner's and the engine's processes are two worlds of their own."""
    world, rank, port_key = (LEARNERS, place, "a") if place < LEARNERS else (WORKERS, place - LEARNERS, "b")
    dist.init_process_group("gloo", store=dist.PrefixStore(port_key, store), rank=rank, world_size=world)
    found = []
    for number, case in enumerate(payload["cases"]):
        dtype = getattr(torch, case["dtype"])
        scene = Scene(place, dtype, **case.get("sizes", {}))
        link = open_link(store, place, PLACES, prefix=f"case {number}", **ADDRESS)
        carrier = transport(scene, link, dtype=dtype, bucket_bytes=case["bucket_bytes"], window=case["window"])
        wrong, fresh, transfer = 0, [], None
        for version in range(2):
            with Allocations() as allocations:
                transfer = carrier.run(scene.source, scene.target)
            fresh.append(allocations.bytes)
            wrong += scene.wrong(version)
            scene.change()
        link.close()
        found.append(
            {
                "wrong": wrong, "fresh": fresh, "minimum": scene.elements * dtype.itemsize, **vars(transfer),
            }
        )  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()
    return found


class Allocations(TorchDispatchMode):
    """Counts the bytes of tensors that operations bring into being: outputs in memory that no input has."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.bytes += tensor.untyped_storage().nbytes()
        return result


class TroubledLink:
    """A link whose owner does `trouble` before it posts its second window, or round."""

    def __init__(self, link: Link, trouble: Any) -> None:
        self.link, self.trouble, self.posts = link, trouble, 0

    def post(self, operations: list[Operation]) -> list[Pending]:
        self.posts += 1
        if self.posts == 2:
            self.trouble()
        return self.link.post(operations)

    def close(self) -> None:
        self.link.close()


def trouble(store: dist.Store, place: int, payload: dict) -> str:
    """What each place is told when the place `culprit` dies, or stays silent, in mid-transfer."""
    culprit = payload["culprit"]
    scene = Scene(place, **payload["sizes"])
    others = [f"told {i}" for i in range(PLACES) if i != culprit]

    def until_all_are_told() -> None:
        deadline = time.monotonic() + 90
        while not store.check(others) and time.monotonic() < deadline:
            time.sleep(0.05)

    def happen() -> None:
        if payload["kind"] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        until_all_are_told()

    link = open_link(store, place, PLACES, prefix="trouble", **ADDRESS)
    carrier = transport(
        scene,
        TroubledLink(link, happen) if place == culprit else link,
        bucket_bytes=1 << 18,
        window=2,
        time_limit_s=payload["time_limit_s"],
    )
    try:
        carrier.run(scene.source, scene.target)
        told = "no error"
    except RunError as error:
        told = str(error)
    store.set(f"told {place}", "yes")
    until_all_are_told()  # the end of this process must not be what the others notice
    return told


def absent(store: dist.Store, place: int, payload: dict) -> str:
    """What a place is told when another never joins."""
    if place == payload["culprit"]:
        return ""
    try:
        open_link(store, place, payload["places"], prefix="absent", device=CPU, time_limit_s=1)
    except RunError as error:
        return str(error)
    return "no error"


def reopened(store: dist.Store, place: int, payload: dict) -> list[str]:
    """A link that its owner closes: what the other is told, what the owner is told; then a new one works."""
    told = []
    link = open_link(store, place, 2, prefix="first", **ADDRESS)
    tensor = torch.zeros(8)
    try:
        if place == 0:
            link.close()
        _exchange(link, place, tensor)
        told.append("no error")
    except RunError as error:
        told.append(str(error))
    link = open_link(store, place, 2, prefix="second", **ADDRESS)
    _exchange(link, place, tensor)
    told.append(str(tensor.tolist()))
    store.set(f"done {place}", "yes")
    store.wait(["done 0", "done 1"])
    return told


def _exchange(link: Link, place: int, tensor: Tensor) -> None:
    mine = torch.full_like(tensor, place + 1)
    pending = link.post([Operation(1 - place, tensor, False, "w"), Operation(1 - place, mine, True, "w")])
    await_all(pending, place=place, started=time.monotonic(), time_limit_s=20)


def pulled(store: dist.Store, place: int, payload: dict) -> list[dict]:
    """One dictionary a dtype."""
    return [_pulled(dist.PrefixStore(name, store), place, getattr(torch, name)) for name in payload["dtypes"]]


def _pulled(store: dist.Store, place: int, dtype: torch.dtype) -> dict[str, Any]:
    """Workers pull twice what the learner ranks export once."""
    scene = Scene(place, dtype)
    found: dict[str, Any] = {"wrong": 0, "minimum": scene.elements * dtype.itemsize}
    if place < LEARNERS:
        export = export_tensors(scene.source)
        store.set(f"export {place}", json.dumps(export.describe()))
        for version in range(2):
            store.wait([f"pulled {version} {i}" for i in range(LEARNERS, PLACES)])
            scene.change()
            found["valid"] = export.still_valid(scene.source)
            store.set(f"changed {version} {place}", "yes")
        return found
    sources = {i: open_export(json.loads(store.get(f"export {i}"))) for i in range(LEARNERS)}
    puller = Puller(scene.plan, place, sources, scene.target, dtype=dtype)
    for version in range(2):
        with Allocations() as allocations:
            transfer: Transfer = puller.run()
        found["fresh"] = allocations.bytes
        found["wrong"] += scene.wrong(version)
        store.set(f"pulled {version} {place}", "yes")
        store.wait([f"changed {version} {i}" for i in range(LEARNERS)])
    return {**found, "received": transfer.bytes_received}


def exporter_and_reader(store: dist.Store, place: int, payload: dict) -> Mapping[str, Any]:
    """Place 0 exports views of one flat buffer and trains on; place 1 reads; then place 0 is killed."""
    if place == 0:
        flat = torch.arange(1000.0)
        weight = torch.nn.Parameter(flat[100:400].view(30, 10))
        late = flat[400:].view(2, 300).t()  # a view that export never sees whole
        export = export_tensors({"weight": weight, "late": late})
        weight.grad = torch.ones_like(weight)
        store.set("export", json.dumps(export.describe()))
        store.wait(["opened"])
        torch.optim.SGD([weight], lr=1.0).step()
        flat[500] = -5
        store.set("changed", "yes")
        store.wait(["read"])
        os.kill(os.getpid(), signal.SIGKILL)
    described = json.loads(store.get("export"))
    tensors = open_export(described)
    before = tensors["weight"].clone(), tensors["late"].clone()
    store.set("opened", "yes")
    store.wait(["changed"])
    after = tensors["weight"].clone(), tensors["late"].clone()
    store.set("read", "yes")
    told = "no error"
    deadline = time.monotonic() + 30
    while told == "no error" and time.monotonic() < deadline:
        try:
            open_export(described)
        except RunError as error:
            told = str(error)
    expected = torch.arange(100.0, 400).view(30, 10)
    expected_late = torch.arange(400.0, 1000).view(2, 300).t()
    changed_late = expected_late.clone()
    changed_late[100, 0] = -5
    return {
        "storages": len(described["storages"]),
        "before": torch.equal(before[0], expected) and torch.equal(before[1], expected_late),
        "after": torch.equal(after[0], expected - 1) and torch.equal(after[1], changed_late),
        "still readable": torch.equal(tensors["weight"], expected - 1),
        "told": told,
        "left": [name for name in os.listdir("/dev/shm") if name.startswith("torch_")],
    }
