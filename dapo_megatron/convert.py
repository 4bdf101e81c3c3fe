"""Checkpoint conversion: a small world on the CPU reads the one form and writes the other, through the learner's own
layouts.

hf-to-megatron SRC DST parallel.tensor=2 parallel.pipeline=2     writes with that many ranks
megatron-to-hf SRC DST                                           reads any layout; parallel.* sets the reading world
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dapo_megatron.config import Recipe, derive_layout, read_architecture
from dapo_megatron.config.load import build_recipe
from dapo_megatron.errors import RequestError
from dapo_megatron.launch import World, start_ranks, world_from_environment
from dapo_megatron.learner.manifest import check_manifest, read_state
from dapo_megatron.resharding.hf_layout import check_checkpoint

TIME_LIMIT_S = 1800.0
ALLOWED = ("parallel.",)


def convert_hf_to_megatron(source: Path, destination: Path, overrides: Sequence[str]) -> int:
    """Write `destination` as a sharded checkpoint of the Hugging Face folder `source`; returns the exit code.

    Raises:
        RequestError: the folder does not hold the tensors its config.json asks for, sizes that do not divide, a
            destination that exists.
    """
    check_checkpoint(source, read_architecture(source))
    return _start("hf-to-megatron", source, destination, overrides, hugging_face=source)


def convert_megatron_to_hf(source: Path, destination: Path, overrides: Sequence[str]) -> int:
    """Write `destination` as a Hugging Face folder from the checkpoint `source`; returns the exit code.

    Raises:
        RequestError: not a checkpoint or a damaged one, a destination that exists.
    """
    check_manifest(source)
    return _start("megatron-to-hf", source, destination, overrides, hugging_face=source / "hf")


def _start(direction: str, source: Path, destination: Path, overrides: Sequence[str], *, hugging_face: Path) -> int:
    foreign = [override for override in overrides if not override.startswith(ALLOWED)]
    if foreign:
        raise RequestError(f"convert takes parallel.* settings only, not {foreign[0]}")
    if destination.exists():
        raise RequestError(f"{destination} exists; name a new folder")
    recipe = _recipe(destination, hugging_face, overrides)
    layout = derive_layout(recipe, read_architecture(hugging_face))
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # conversion is for the CPU
    command = [sys.executable, "-m", "dapo_megatron.convert", direction, str(source), str(destination), *overrides]
    code = start_ranks(command, layout.world)
    if code == 0:
        print(destination)
    return code


def _recipe(destination: Path, hugging_face: Path, overrides: Sequence[str]) -> Recipe:
    settings = {"run": {"directory": str(destination), "steps": 0}, "model": {"path": str(hugging_face)}}
    return build_recipe(settings, overrides)


def _convert(direction: str, source: Path, destination: Path, overrides: Sequence[str], world: World) -> None:
    """One rank's part."""
    import torch

    from dapo_megatron.learner.checkpoint import load_checkpoint, save_checkpoint
    from dapo_megatron.learner.distributed import choose_device, form_groups, join_world, leave_world
    from dapo_megatron.learner.learner import Learner
    from dapo_megatron.resharding.hf_files import TORCH_DTYPES, folder_dtype
    from dapo_megatron.weight_sync import export_hugging_face

    from_hf = direction == "hf-to-megatron"
    hugging_face = source if from_hf else source / "hf"
    recipe = _recipe(destination, hugging_face, overrides)
    architecture = read_architecture(hugging_face)
    layout = derive_layout(recipe, architecture, world.size)
    device = choose_device("cpu", world.local_rank)
    join_world(world, device=device, time_limit_s=TIME_LIMIT_S)
    try:
        form_groups(layout, seed=0, time_limit_s=TIME_LIMIT_S)
        dtype = folder_dtype(source) if from_hf else TORCH_DTYPES[read_state(source)["dtype"]]
        learner = Learner(
            architecture,
            layout,
            dtype=dtype,
            device=device,
            layer_spec="local",
            tokens_per_micro_batch=1,
            weights=source if from_hf else None,
        )
        with torch.no_grad():
            if from_hf:
                save_checkpoint(destination, learner, {"step": 0, "updates": 0}, side_files=hugging_face)
            else:
                load_checkpoint(source, learner)
                export_hugging_face(learner, destination, side_files=hugging_face, time_limit_s=TIME_LIMIT_S)
    finally:
        leave_world()


if __name__ == "__main__":
    from dapo_megatron.errors import exit_with_message

    with exit_with_message():
        _convert(
            sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:], world_from_environment() or World(0, 1, 0)
        )
