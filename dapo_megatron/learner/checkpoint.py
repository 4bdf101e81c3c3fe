"""Checkpoints of a run: megatron shards (`dist_checkpointing`), the run's own state, and a manifest of SHA-256 sums.

    checkpoints/step-000010/
        shards/        model and optimizer, loadable at another TP/PP/DP
        hf/            config.json and tokenizer, so that the folder can be converted alone
        surplus.safetensors   groups kept for the next step, if any
        state.json     rollout step, optimizer updates, supervised steps, place in the prompt order, dtype
        manifest.json  SHA-256 of every other file: nothing is parsed before it agrees (shard metadata is pickle)

A checkpoint is written beside its final name and renamed, so one that is there is whole.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from dapo_megatron.data.completions import PromptGroup
from dapo_megatron.data.group_files import load_groups, save_groups
from dapo_megatron.errors import RequestError
from dapo_megatron.files import replace_folder, write_text_atomically
from dapo_megatron.learner.learner import Learner
from dapo_megatron.learner.manifest import MANIFEST, file_sums, list_checkpoints, read_state
from dapo_megatron.learner.optimizer import set_rates
from dapo_megatron.resharding.hf_files import TORCH_DTYPES, copy_side_files

SURPLUS = "surplus.safetensors"
OPTIMIZER_FORMAT = "fully_reshardable"  # loadable at another TP, PP and DP


def save_checkpoint(
    folder: Path,
    learner: Learner,
    state: dict,
    *,
    side_files: Path,
    groups: Sequence[PromptGroup] = (),
    keep: int | None = None,
) -> None:
    """Write a checkpoint of all ranks; collective.

    `groups`: those kept for the next step. `keep`: older siblings beyond the newest `keep` are deleted.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "shards").mkdir(parents=True)
        (temporary / "hf").mkdir()
    dist.barrier()
    dist_checkpointing.save(_sharded_state(learner), str(temporary / "shards"), validate_access_integrity=True)
    dist.barrier()
    if first:
        copy_side_files(side_files, temporary / "hf")
        dtype = next(name for name, dtype in TORCH_DTYPES.items() if dtype is learner.dtype)
        write_text_atomically(temporary / "state.json", json.dumps({**state, "dtype": dtype}, indent=2))
        if groups:
            save_groups(temporary / SURPLUS, groups)
        write_text_atomically(temporary / MANIFEST, json.dumps(file_sums(temporary), indent=2))
        replace_folder(temporary, folder)
        if keep is not None:
            for old in list_checkpoints(folder.parent)[:-keep]:
                shutil.rmtree(old)
    dist.barrier()


def load_surplus(folder: Path) -> list[PromptGroup]:
    """The groups that a checkpoint keeps for the next step."""
    return load_groups(folder / SURPLUS) if (folder / SURPLUS).exists() else []


def load_checkpoint(folder: Path, learner: Learner) -> None:
    """Fill the learner's weights, and its optimizer if it has one, from a checkpoint written at any layout; collective.

    Raises:
        RequestError: the checkpoint is of another model, or has no optimizer state where one is wanted.
    """
    optimizer = learner.optimizer
    template = _sharded_state(learner, loading=True)
    with torch.no_grad():
        try:
            loaded = dist_checkpointing.load(template, str(folder / "shards"))
        except (CheckpointingException, CheckpointException, KeyError) as error:
            raise RequestError(f"{folder} does not fit this model: {str(error).splitlines()[0]}") from None
        for v, model in enumerate(learner.models):
            model.load_state_dict(loaded[f"model{v}"], strict=False)
        if optimizer is not None:
            updates = int(read_state(folder)["updates"])
            for part in _parts(optimizer):
                _tolerate_step(part, loaded["optimizer"], updates)
            optimizer.load_state_dict(loaded["optimizer"])
            _set_steps(optimizer, updates)


def _sharded_state(learner: Learner, *, loading: bool = False) -> dict:
    if learner.optimizer is not None:
        _ensure_state(learner.optimizer)
    state = {}
    for v, model in enumerate(learner.models):
        # chunks of a virtual pipeline number their layers globally, so one name space serves all
        state[f"model{v}"] = model.sharded_state_dict()
    if learner.optimizer is not None:
        model_state = {f"model{v}": state[f"model{v}"] for v in range(len(learner.models))}
        merged = model_state["model0"] if len(learner.models) == 1 else model_state
        state["optimizer"] = learner.optimizer.sharded_state_dict(
            merged, is_loading=loading, metadata={"distrib_optim_sharding_type": OPTIMIZER_FORMAT}
        )
    return state


def _parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _ensure_state(optimizer: MegatronOptimizer) -> None:
    """AdamW has no moments before its first step, and megatron's sharded state needs them: zeros, weights untouched."""
    for part in _parts(optimizer):
        if part.optimizer.state:
            continue
        if isinstance(part, DistributedOptimizer):
            set_rates(part, 0.0, 0.0)
            part._init_optimizer_states_with_dummy_values()
        else:
            part.init_state_fn(part.optimizer, part.config)
        _set_steps(part, 0)


def _tolerate_step(part: MegatronOptimizer, loaded: dict, updates: int) -> None:
    """megatron-core 0.16 stumbles over the `step` that torch's AdamW keeps beside the moments: hand it back."""
    if not isinstance(part, DistributedOptimizer):
        inner = loaded.get("optimizer", loaded)
        inner["state"].setdefault("common_step", torch.tensor(float(updates)))  # left out by megatron when it is 0
        return
    load = type(part)._set_main_param_and_optimizer_states

    def load_with_step(model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        group, place = part.model_param_group_index_map[model_param]
        state = part.optimizer.state[part.optimizer.param_groups[group]["params"][place]]
        load(part, model_param, {**{key: state[key] for key in ("step",) if key in state}, **tensors})

    part._set_main_param_and_optimizer_states = load_with_step


def _set_steps(optimizer: MegatronOptimizer, updates: int) -> None:
    """megatron leaves a wrong `step`, or none, in torch's AdamW after loading: bias correction would drift."""
    for part in _parts(optimizer):
        inner = part.optimizer
        for state in inner.state.values():
            if isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
                state["step"] = torch.tensor(float(updates))
        for group in inner.param_groups:
            if "step" in group:
                group["step"] = updates
