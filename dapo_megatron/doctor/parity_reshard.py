"""One reshard as a run does it: Megatron ranks to engine workers by messages, then a checksum of every slice.

`python -m dapo_megatron.doctor.parity_reshard FOLDER` is a rank of it: the first two are learner ranks.
"""

import json
import math
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_megatron.config import derive_layout
from dapo_megatron.doctor.parity_model import read_tiny, read_trial, tiny_recipe
from dapo_megatron.doctor.verdict import Measurement
from dapo_megatron.errors import RunError, exit_with_message
from dapo_megatron.launch import free_port, start_ranks, world_from_environment
from dapo_megatron.resharding.bridge import Bridge
from dapo_megatron.resharding.checksum import checksum
from dapo_megatron.resharding.hf_files import read_placements
from dapo_megatron.resharding.megatron_layout import megatron_layout
from dapo_megatron.resharding.transport import local_view
from dapo_megatron.resharding.vllm_layout import vllm_local_shapes

LEARNERS = 2
LIMIT_S = 60.0
FOUND = "reshard-found.json"


def reshard(folder: Path) -> Measurement:
    """How many slices arrived with another checksum. NCCL between GPUs where there are three or more, else gloo."""
    gpus = torch.cuda.device_count()
    workers = 2 if gpus >= LEARNERS + 2 else 1
    world = LEARNERS + workers
    os.environ["DAPO_DOCTOR_STORE"] = str(free_port())
    code = start_ranks([sys.executable, "-m", "dapo_megatron.doctor.parity_reshard", str(folder)], world)
    if code:
        raise RunError(f"a rank ended with code {code}")
    found = json.loads((folder / FOUND).read_text())
    how = "NCCL" if gpus >= world else "gloo"
    what = f"slices of {found['slices']} differ, tensor 2 into {workers} workers over {how}, {found['bytes']} bytes"
    return Measurement(found["wrong"], 0, what)


def main(folder: Path) -> None:
    """One rank."""
    world = world_from_environment()
    gpus = torch.cuda.device_count()
    device = torch.device("cuda", world.rank) if gpus >= world.size else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = timedelta(seconds=LIMIT_S)
    port = int(os.environ["DAPO_DOCTOR_STORE"])
    store = dist.TCPStore("127.0.0.1", port, world.size, is_master=world.rank == 0, timeout=limit)
    bridge = _bridge(folder, workers=world.size - LEARNERS)
    tensors = _tensors(bridge, world.rank, folder, device)
    learner = world.rank < LEARNERS
    transport = bridge.open_transport(store, world.rank, device=device, prefix="doctor")
    transfer = transport.run(tensors if learner else {}, {} if learner else tensors)
    store.set(f"sums {world.rank}", json.dumps([_sums(bridge, world.rank, tensors), transfer.bytes_received]))
    if world.rank == 0:
        told = [json.loads(store.get(f"sums {rank}")) for rank in range(world.size)]  # waits for each
        given = {i: value for sums, _ in told[:LEARNERS] for i, value in sums.items()}
        taken = {i: value for sums, _ in told[LEARNERS:] for i, value in sums.items()}
        wrong = sum(given.get(i) != taken.get(i) for i in given.keys() | taken.keys())
        result = {"slices": len(given), "wrong": wrong, "bytes": sum(count for _, count in told)}
        (folder / FOUND).write_text(json.dumps(result))
    store.set(f"done {world.rank}", "yes")
    store.wait([f"done {rank}" for rank in range(world.size)], limit)
    transport.close()


def _bridge(folder: Path, *, workers: int) -> Bridge:
    architecture = read_tiny(folder)
    recipe = tiny_recipe(read_trial(folder), folder, parallel={"tensor": LEARNERS})
    return Bridge(
        architecture=architecture, layout=derive_layout(recipe, architecture), layer_spec="local", engines=1,
        tensor=workers, dtype="float32", transport="group", bucket_bytes=1 << 20, window=64, time_limit_s=LIMIT_S,
    )  # fmt: skip


def _tensors(bridge: Bridge, place: int, folder: Path, device: torch.device) -> dict[str, Tensor]:
    """A learner rank's shards, read as a run reads them; a worker's parameters, NaN until they are written."""
    if place >= LEARNERS:
        shapes = vllm_local_shapes(bridge.architecture, bridge.tensor)
        return {name: torch.full(shape, math.nan, device=device) for name, shape in shapes.items()}
    placements = megatron_layout(bridge.architecture, bridge.layout).placements[place]
    shapes: dict[str, tuple[int, ...]] = {}
    for p in placements:
        ends = tuple(start + size for start, size in zip(p.offset, p.shape, strict=True))
        shapes[p.key] = tuple(map(max, shapes.get(p.key, ends), ends))
    tensors = {key: torch.zeros(shape, device=device) for key, shape in shapes.items()}
    read_placements(folder, placements, tensors)
    return tensors


def _sums(bridge: Bridge, place: int, tensors: dict[str, Tensor]) -> dict[str, int]:
    """Number of the move → checksum of this place's end of it."""
    found = {}
    for number, move in enumerate(bridge.plan.moves):
        if move.source_rank == place:
            found[str(number)] = checksum(local_view(tensors, move.source_key, move.source_offset, move.shape))
        elif move.target_rank == place:
            found[str(number)] = checksum(local_view(tensors, move.target_key, move.target_offset, move.shape))
    return found


if __name__ == "__main__":
    with exit_with_message():
        main(Path(sys.argv[1]))
