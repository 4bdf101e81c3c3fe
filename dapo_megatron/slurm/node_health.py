"""Are the nodes of a job fit to train? `python -m dapo_megatron.slurm.node_health RECIPE [key.sub=value ...]`

Run by every rank of the job's world before the run. Each node alone, then all together, times an all-reduce:

    bus bandwidth = 2 (n - 1) / n x bytes / seconds

which is the same for any n ranks on links of one speed (the measure of NCCL's own tests). GPUs are counted, free space
is read, and whatever is wrong is told with the node's name. Exit code 0: fit; 1: not fit.
"""

import os
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from dapo_megatron.config import Recipe, load_recipe
from dapo_megatron.errors import RequestError, RunError, exit_with_message
from dapo_megatron.launch import World, name_meeting_point, world_from_environment
from dapo_megatron.slurm.placement import place_ranks

TIME_LIMIT_S = 180.0  # of every wait for other ranks
TRIES = 3
GPU_BYTES, CPU_BYTES = 1 << 30, 1 << 23  # reduced at a time


@dataclass(frozen=True)
class Finding:
    """What one rank saw of its node. `node_gb_per_s` is 0 on a node with one rank, which has nobody to talk to."""

    node: str
    gpus: int
    free_gb: float
    node_gb_per_s: float
    world_gb_per_s: float


def complaints(findings: Sequence[Finding], recipe: Recipe) -> list[str]:
    """What is wrong, one line a fault; `findings`: one of each node."""
    wanted, slurm = place_ranks(recipe).gpus_per_node, recipe.slurm
    told = []
    for seen in findings:
        if seen.gpus < wanted:
            told.append(f"{seen.node}: {seen.gpus} GPUs where slurm.gpus_per_node asks for {wanted}")
        if seen.free_gb < slurm.least_disk_gb:
            told.append(
                f"{seen.node}: {seen.free_gb:.1f} GB free for run.directory={recipe.run.directory}, below "
                f"slurm.least_disk_gb={slurm.least_disk_gb:g}"
            )
        if 0 < seen.node_gb_per_s < slurm.least_gb_per_s:
            told.append(
                f"{seen.node}: all-reduce inside the node at {seen.node_gb_per_s:.2f} GB/s, below "
                f"slurm.least_gb_per_s={slurm.least_gb_per_s:g}"
            )
    between = min((seen.world_gb_per_s for seen in findings), default=0.0)
    if len(findings) > 1 and between < slurm.least_gb_per_s:
        told.append(
            f"all-reduce between all {len(findings)} nodes at {between:.2f} GB/s, below "
            f"slurm.least_gb_per_s={slurm.least_gb_per_s:g}"
        )
    return told


def check_nodes(recipe: Recipe, world: World) -> None:
    """Collective over the job's world, whose gloo group exists; rank 0 prints a line a node.

    Raises:
        RunError: a rank found something wrong; the same on every rank.
    """
    import torch

    on_gpu = place_ranks(recipe).gpus_per_node > 0
    gpus = torch.cuda.device_count() if on_gpu else 0
    device = torch.device("cuda", world.local_rank) if world.local_rank < gpus else torch.device("cpu")
    places = _from_all((socket.gethostname(), device.type), world)
    nodes: dict[str, list[int]] = {}
    for rank, (name, _) in enumerate(places):
        nodes.setdefault(name, []).append(rank)
    measured = (0.0, 0.0)
    if not on_gpu or all(kind == "cuda" for _, kind in places):
        measured = _bandwidths(nodes, world, device)
    free = shutil.disk_usage(_existing(Path(recipe.run.directory))).free / 1e9
    everybody = _from_all(Finding(socket.gethostname(), gpus, free, *measured), world)
    # a node is as fast as its slowest rank says
    slowest = [min((everybody[r] for r in ranks), key=lambda seen: seen.node_gb_per_s) for ranks in nodes.values()]
    if world.rank == 0:
        for seen in slowest:
            print(
                f"health: {seen.node}: {seen.gpus} GPUs, {seen.free_gb:.0f} GB free, all-reduce "
                f"{seen.node_gb_per_s:.2f} GB/s in the node, {seen.world_gb_per_s:.2f} GB/s over all",
                flush=True,
            )
    if told := complaints(slowest, recipe):
        raise RunError("\n".join(f"not fit: {line}" for line in told), on_every_rank=True)


def _from_all(value: Any, world: World) -> list[Any]:
    """`value` of every rank, in their order."""
    import torch.distributed as dist

    found: list[Any] = [None] * world.size
    dist.all_gather_object(found, value)
    return found


def _bandwidths(nodes: dict[str, list[int]], world: World, device) -> tuple[float, float]:
    """(GB/s in this rank's node, GB/s over the world), bus bandwidth."""
    import torch
    import torch.distributed as dist

    limit = timedelta(seconds=TIME_LIMIT_S)
    backend, size = ("nccl", GPU_BYTES) if device.type == "cuda" else ("gloo", CPU_BYTES)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    buffer_N = torch.ones(size // 4, device=device)
    groups = {name: dist.new_group(ranks, backend=backend, timeout=limit) for name, ranks in nodes.items()}
    everybody = dist.new_group(list(range(world.size)), backend=backend, timeout=limit)
    own = next(name for name, ranks in nodes.items() if world.rank in ranks)
    found = []
    for group, ranks in ((groups[own], len(nodes[own])), (everybody, world.size)):
        seconds = [_timed(buffer_N, group) for _ in range(TRIES + 1)][1:]  # the first one makes the connections
        found.append(2 * (ranks - 1) / ranks * size / min(seconds) / 1e9)
    return found[0], found[1]


def _timed(buffer_N, group) -> float:
    import torch
    import torch.distributed as dist

    on_gpu = buffer_N.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    started = time.perf_counter()
    dist.all_reduce(buffer_N, op=dist.ReduceOp.MAX, group=group)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _existing(path: Path) -> Path:
    """The nearest folder above `path` that is there."""
    return path if path.exists() else _existing(path.absolute().parent)


def main(arguments: Sequence[str]) -> None:
    """One rank of the check, from joining the world to leaving it."""
    recipe = load_recipe(arguments[0], arguments[1:])
    if recipe.learner.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    world = world_from_environment()
    if world is None:
        world = World(0, 1, 0)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    name_meeting_point()
    import torch.distributed as dist

    # gloo, so that what was found is told even where a GPU is missing
    dist.init_process_group("gloo", rank=world.rank, world_size=world.size, timeout=timedelta(seconds=TIME_LIMIT_S))
    try:
        check_nodes(recipe, world)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    with exit_with_message():
        if len(sys.argv) < 2:
            raise RequestError("node_health needs a recipe: python -m dapo_megatron.slurm.node_health RECIPE")
        main(sys.argv[1:])
