"""One start-up for NCCL and gloo: this process's place in the world and its device."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from dapo_megatron.errors import RequestError
from dapo_megatron.launch import World
from dapo_megatron.learner.parallel_groups import forget_groups


def choose_device(setting: str, local_rank: int) -> torch.device:
    """learner.device → the device of this rank. Raises RequestError for cuda where there is none."""
    if setting == "cuda" and not torch.cuda.is_available():
        raise RequestError("learner.device=cuda but torch sees no GPU; use auto or cpu")
    if setting == "cpu" and torch.cuda.is_available():
        raise RequestError("learner.device=cpu but torch sees GPUs; hide them: CUDA_VISIBLE_DEVICES=''")
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise RequestError(
            f"local rank {local_rank} has no GPU of its own, this machine shows {torch.cuda.device_count()}; "
            "start fewer ranks on it (parallel.*), or use learner.device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def join_world(world: World, *, device: torch.device, time_limit_s: float) -> None:
    """Form the default process group (NCCL on GPUs, gloo otherwise); every collective fails after `time_limit_s`."""
    if world.size == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise RequestError(
            f"{' and '.join(missing)} must name the meeting point of {world.size} ranks; export them first"
        )
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=time_limit_s),
        **({"device_id": device} if device.type == "cuda" else {}),
    )


def leave_world() -> None:
    """Destroy all groups, if any."""
    if dist.is_initialized():
        forget_groups()
        dist.destroy_process_group()
