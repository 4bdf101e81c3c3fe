"""One place of tools/bench_resharding.py: the ways in which it gives, or gets, the same weights; started by it.

Places 0–3 are learner ranks at TP2 × PP2, places 4 and 5 the workers of one engine at TP2 that hold vLLM's own model.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dapo_megatron.config import Architecture, Layout
from dapo_megatron.config.architecture import architecture_from_dict
from dapo_megatron.resharding.hf_layout import canonical_tensors, whole_layout
from dapo_megatron.resharding.layout import Placement, WeightLayout
from dapo_megatron.resharding.links import Link, Operation, await_all, open_link
from dapo_megatron.resharding.megatron_layout import megatron_layout
from dapo_megatron.resharding.plan import Plan, make_plan
from dapo_megatron.resharding.shared_memory import Puller, export_tensors, open_export
from dapo_megatron.resharding.transport import Transport
from dapo_megatron.resharding.vllm_layout import vllm_layout

LEARNERS, WORKERS = 4, 2
PLACES = LEARNERS + WORKERS
LIMIT_S = 300.0
BUCKET_BYTES = 64 << 20
WARM_UP = 2  # rounds before those that count
CPU = torch.device("cpu")


@dataclass
class Count:
    """Bytes and messages (or collective calls) that this place has received, or read and written as files."""

    bytes: int = 0
    messages: int = 0


class Place:
    """What this process holds, and its connections."""

    def __init__(self, store: dist.Store, place: int, payload: dict[str, Any]) -> None:
        self.store, self.place, self.folder = store, place, Path(payload["folder"])
        self.dtype: torch.dtype = getattr(torch, payload["dtype"])
        self.architecture: Architecture = architecture_from_dict(payload["config"], "config")
        self.source: WeightLayout = megatron_layout(self.architecture, learner_layout(self.architecture))
        self.target = vllm_layout(self.architecture, engines=1, tensor=WORKERS, first_rank=LEARNERS)
        self.plan: Plan = make_plan(self.source, self.target)
        self.learns = place < LEARNERS
        self.everyone = self.group("everyone", list(range(PLACES)))
        self.link: Link = open_link(store, place, PLACES, device=CPU, time_limit_s=LIMIT_S, prefix="link")
        self.weights: dict[str, Tensor] = {}  # a learner's shards
        self.parameters: dict[str, Tensor] = {}  # an engine's
        self.model: Any = None
        if self.learns:
            self.weights = filled(self.source.placements[place], self.dtype)
        else:
            self.model = vllm_model(self.folder, payload["dtype"], place - LEARNERS, payload["engine_port"])
            self.parameters = {name: parameter.data for name, parameter in self.model.named_parameters()}

    def group(self, name: str, members: list[int]) -> dist.ProcessGroupGloo | None:
        """A gloo group of these places; None where this one is not among them."""
        if self.place not in members:
            return None
        return dist.ProcessGroupGloo(
            dist.PrefixStore(f"group {name}", self.store),
            members.index(self.place),
            len(members),
            timedelta(seconds=LIMIT_S),
        )

    def transport(self, plan: Plan) -> Transport:
        return Transport(
            plan, self.place, dtype=self.dtype, device=CPU, bucket_bytes=BUCKET_BYTES, window=256,
            time_limit_s=LIMIT_S, link=self.link,
        )  # fmt: skip

    def wrong(self) -> int:
        """Elements of the engine's parameters that are not those of the canonical tensors."""
        if self.learns:
            return 0
        expected = filled(self.target.placements[self.place], self.dtype)
        return sum(int((self.parameters[key] != tensor).sum()) for key, tensor in expected.items())


def messages_way(p: Place) -> Callable[[], Count]:
    """The plan, by messages."""
    transport = p.transport(p.plan)

    def run() -> Count:
        transfer = transport.run(p.weights, p.parameters)
        return Count(transfer.bytes_received, transfer.messages_received)

    return run


def shared_way(p: Place) -> Callable[[], Count]:
    """The plan, straight from the learner's memory."""
    if p.learns:
        export = export_tensors({key: tensor.clone() for key, tensor in p.weights.items()})
        p.store.set(f"export {p.place}", json.dumps(export.describe()))

        def check() -> Count:
            assert export.still_valid(export.tensors)
            return Count()

        return check
    sources = {i: open_export(json.loads(p.store.get(f"export {i}"))) for i in range(LEARNERS)}
    puller = Puller(p.plan, p.place, sources, p.parameters, dtype=p.dtype)
    return lambda: Count(puller.run().bytes_received, 0)


def gather_way(p: Place) -> Callable[[], Count]:
    """Every learner rank gathers every whole tensor; rank 0 broadcasts them to the workers, which load_weights.

    A layer at a time: shards are gathered over the tensor ranks, then broadcast to the other pipeline stage.
    """
    tensor_group = [p.group(f"tensor {s}", [2 * s, 2 * s + 1]) for s in range(2)][p.place // 2 if p.learns else 0]
    stage_group = [p.group(f"stage {t}", [t, t + 2]) for t in range(2)][p.place % 2 if p.learns else 0]
    engine_group = p.group("engine", [0, *range(LEARNERS, PLACES)])
    units = [(stage, unit) for stage in range(2) for unit in units_of(p.source.placements[2 * stage])]
    shapes = canonical_tensors(p.architecture)
    extents = [extents_of(p.source.placements[rank]) for rank in range(LEARNERS)]

    def learner() -> Count:
        count = Count()
        for stage, keys in units:
            shards: dict[int, dict[str, Tensor]] = {2 * stage: {}, 2 * stage + 1: {}}
            for key in keys:
                both = [torch.empty(extents[2 * stage + t][key], dtype=p.dtype) for t in range(2)]
                if p.place // 2 == stage:
                    tensor_group.allgather([[bits(b) for b in both]], [bits(p.weights[key])]).wait()
                    count.bytes += both[0].nbytes
                else:
                    count.bytes += sum(b.nbytes for b in both)
                for t in range(2):
                    stage_group.broadcast(bits(both[t]), stage).wait()
                    shards[2 * stage + t][key] = both[t]
                count.messages += 3
            if p.place == 0:
                for whole in whole_of(p.source, shards, shapes, p.dtype).values():
                    engine_group.broadcast(bits(whole), 0).wait()
        return count

    def worker() -> Count:
        count = Count()
        for stage, keys in units:
            named = []
            for name in names_of(p.source.placements[2 * stage], keys):
                whole = torch.empty(shapes[name], dtype=p.dtype)
                engine_group.broadcast(bits(whole), 0).wait()
                named.append((name, whole))
                count.bytes, count.messages = count.bytes + whole.nbytes, count.messages + 1
            p.model.load_weights(named)
        return count

    return learner if p.learns else worker


def file_way(p: Place) -> Callable[[], Count]:
    """Whole tensors on rank 0 (by messages), a safetensors file, load_weights from it."""
    target = whole_layout(p.architecture, [0])
    path = p.folder / "weights.safetensors"
    transport = p.transport(make_plan(p.source, target))

    def learner() -> Count:
        whole = {n: torch.empty(s, dtype=p.dtype) for n, s in target.shapes.items()} if p.place == 0 else {}
        transfer = transport.run(p.weights, whole)
        written = 0
        if p.place == 0:
            save_file(whole, path)
            written = path.stat().st_size
        p.everyone.barrier().wait()
        return Count(transfer.bytes_received + written, transfer.messages_received)

    def worker() -> Count:
        p.everyone.barrier().wait()
        with safe_open(path, "pt") as file:
            p.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
        return Count(path.stat().st_size, 0)

    return learner if p.learns else worker


def raw_messages(p: Place) -> Callable[[], Count]:
    """The floor of messages: the plan's bytes between each two places as one flat message."""
    loads: dict[tuple[int, int], int] = {}
    for move in p.plan.moves:
        pair = move.source_rank, move.target_rank
        if p.place in pair:
            loads[pair] = loads.get(pair, 0) + move.elements * p.dtype.itemsize
    operations = [
        Operation(pair[1] if p.learns else pair[0], torch.ones(size, dtype=torch.uint8), p.learns, "bytes")
        for pair, size in loads.items()
    ]

    def run() -> Count:
        pending = p.link.post(operations)
        await_all(pending, place=p.place, started=time.monotonic(), time_limit_s=LIMIT_S)
        return Count(0 if p.learns else sum(loads.values()), 0 if p.learns else len(loads))

    return run


def raw_copies(p: Place) -> Callable[[], Count]:
    """The floor of shared memory: each worker copies as many bytes as it needs, flat, out of memory of its own."""
    if p.learns:
        worker = LEARNERS + p.place
        if worker >= PLACES:
            return Count
        size = sum(m.elements for m in p.plan.moves if m.target_rank == worker) * p.dtype.itemsize
        export = export_tensors({"flat": torch.ones(size, dtype=torch.uint8)})
        p.store.set(f"flat {worker}", json.dumps(export.describe()))

        def keep() -> Count:
            assert export.still_valid(export.tensors)
            return Count()

        return keep
    flat = open_export(json.loads(p.store.get(f"flat {p.place}")))["flat"]
    into = torch.ones_like(flat)

    def run() -> Count:
        into.copy_(flat)
        return Count(into.nbytes, 0)

    return run


WAYS = {
    "plan, messages": messages_way,
    "plan, shared memory": shared_way,
    "gather, broadcast, load_weights": gather_way,
    "file, load_weights": file_way,
    "raw gloo": raw_messages,
    "raw shared-memory copy": raw_copies,
}


def learner_layout(a: Architecture) -> Layout:
    """TP2 × PP2."""
    return Layout(
        world=LEARNERS, tensor=2, pipeline=2, virtual_pipeline=1, context=1, data=1, sequence_parallel=False,
        layers_per_chunk=a.layers // 2, mini_batch_prompts=1, updates_per_step=1, responses_per_step=1,
        padded_vocab=-(-a.vocab // 64) * 64,
    )  # fmt: skip


def extents_of(placements: tuple[Placement, ...]) -> dict[str, tuple[int, ...]]:
    """Local key → shape that holds all its placements."""
    found: dict[str, tuple[int, ...]] = {}
    for p in placements:
        ends = tuple(o + n for o, n in zip(p.offset, p.shape, strict=True))
        found[p.key] = tuple(map(max, ends, found.get(p.key, ends)))
    return found


def filled(placements: tuple[Placement, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    """Local tensors with the values of the canonical ones, which follow from name and index alone."""
    tensors = {key: torch.zeros(shape, dtype=dtype) for key, shape in extents_of(placements).items()}
    for p in placements:
        seed = sum(p.name.encode()) % 97
        index = torch.zeros(p.shape, dtype=torch.int32)
        for d, (start, stop) in enumerate(p.box):
            factor = 31 if d == 0 else 7
            line = torch.arange(start, stop, dtype=torch.int32) * factor
            index += line.view([-1 if e == d else 1 for e in range(len(p.box))])
        inside = tuple(slice(o, o + n) for o, n in zip(p.offset, p.shape, strict=True))
        tensors[p.key][inside] = ((index + seed) % 251 - 125).to(dtype) / 128
    return tensors


def units_of(placements: tuple[Placement, ...]) -> list[list[str]]:
    """The keys of each layer, and of what is in no layer."""
    units: dict[str, list[str]] = {}
    for key in dict.fromkeys(p.key for p in placements):
        head, _, rest = key.partition("decoder.layers.")
        units.setdefault(head + rest.split(".")[0] if rest else key, []).append(key)
    return list(units.values())


def names_of(placements: tuple[Placement, ...], keys: list[str]) -> list[str]:
    """Canonical names that lie in these keys, in order."""
    return list(dict.fromkeys(p.name for p in placements if p.key in keys))


def whole_of(
    layout: WeightLayout, shards: dict[int, dict[str, Tensor]], shapes: dict[str, tuple[int, ...]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Whole canonical tensors from the shards of all tensor ranks of a stage."""
    whole: dict[str, Tensor] = {}
    for rank, local in shards.items():
        for p in layout.placements[rank]:
            if p.key in local:
                if p.name not in whole:
                    whole[p.name] = torch.empty(shapes[p.name], dtype=dtype)
                inside = tuple(slice(o, o + n) for o, n in zip(p.offset, p.shape, strict=True))
                whole[p.name][tuple(slice(*edge) for edge in p.box)] = local[p.key][inside]
    return whole


def bits(tensor: Tensor) -> Tensor:
    """A contiguous tensor as flat bytes: gloo moves any dtype so."""
    return tensor.view(-1).view(torch.uint8)


def vllm_model(folder: Path, dtype: str, worker: int, port: int) -> Any:
    """vLLM's model of the folder's config.json on this tensor-parallel worker, with vLLM's own groups."""
    from dapo_megatron.rollout import vllm_plugin

    vllm_plugin.register()
    from vllm.config import set_current_vllm_config
    from vllm.distributed.parallel_state import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model
    from vllm.v1.worker.cpu_model_runner import _set_torch_accelerator_to_noop

    _set_torch_accelerator_to_noop()  # as vLLM's CPU worker does before it loads
    config = EngineArgs(
        model=str(folder), dtype=dtype, tensor_parallel_size=WORKERS, distributed_executor_backend="mp",
        load_format="dummy", enforce_eager=True, skip_tokenizer_init=True, max_model_len=256,
    ).create_engine_config()  # fmt: skip
    with set_current_vllm_config(config):
        init_distributed_environment(
            world_size=WORKERS, rank=worker, local_rank=worker, backend="gloo",
            distributed_init_method=f"tcp://127.0.0.1:{port}",
        )  # fmt: skip
        ensure_model_parallel_initialized(WORKERS, 1)
        return get_model(vllm_config=config)


def peak_bytes(run: profile) -> int:
    """The most bytes of tensors alive at once that were made while `run` watched."""
    alive = most = 0
    events = (e for e in run.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def rounds(p: Place, repeats: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every way: first checked and watched for memory, then warm, then timed, the ways taking turns."""
    ways = {name: way(p) for name, way in WAYS.items()}
    for number in range(1 - WARM_UP, repeats + 1):
        first = number == 1 - WARM_UP
        for name, run in ways.items():
            if first:
                for tensor in p.parameters.values():
                    tensor.zero_()
            watch = profile(activities=[ProfilerActivity.CPU], profile_memory=True) if first else nullcontext()
            p.everyone.barrier().wait()
            with watch:
                begin = time.monotonic()
                with torch.no_grad():
                    count = run()
                end = time.monotonic()
            p.everyone.barrier().wait()
            found: dict[str, Any] = {"begin": begin, "end": end, "bytes": count.bytes, "messages": count.messages}
            if first and not name.startswith("raw"):
                found |= {"wrong": p.wrong(), "peak": peak_bytes(watch)}
            yield name, found


def main(folder: str, place: str, port: str) -> None:
    """Run all rounds and leave what was seen as JSON in the folder."""
    torch.set_num_threads(1)
    payload = json.loads((Path(folder) / "payload.json").read_text())
    store = dist.TCPStore("127.0.0.1", int(port), is_master=False, wait_for_workers=False)
    seen: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for name, found in rounds(Place(store, int(place), payload), payload["repeats"]):
        seen[name].append(found)
    (Path(folder) / f"{place}.json").write_text(json.dumps(seen))
    sys.stdout.flush()
    os._exit(0)  # vLLM's groups need no farewell


if __name__ == "__main__":
    main(*sys.argv[1:])
