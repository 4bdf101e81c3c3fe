"""One start-up for NCCL and gloo: this process's place in the world, its device, and megatron's groups."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from dapo_megatron.config import Layout
from dapo_megatron.errors import RequestError
from dapo_megatron.launch import World
from dapo_megatron.learner import megatron_cpu

megatron_cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402


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


def form_groups(layout: Layout, *, seed: int, time_limit_s: float) -> None:
    """megatron's tensor-, pipeline- and data-parallel groups for the layout, and its random-number tracker."""
    _forget_groups()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        distributed_timeout_minutes=max(1, round(time_limit_s / 60)),
    )
    model_parallel_cuda_manual_seed(seed)


def leave_world() -> None:
    """Destroy all groups, if any."""
    if dist.is_initialized():
        _forget_groups()
        dist.destroy_process_group()


def _forget_groups() -> None:
    """Destroy megatron's groups, where formed: a gloo group left behind keeps three threads polling for ever."""
    for group in parallel_state._global_process_group_list or ():
        if group is not None:  # None stands for the default group
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
