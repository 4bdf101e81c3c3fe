"""A learner's checkpoint, loaded at any layout. checkpoint_saver.py writes it, checkpoint_files.py says which files
there are."""

from collections.abc import Mapping
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from dapo_megatron.errors import RequestError
from dapo_megatron.learner.learner import Learner
from dapo_megatron.learner.manifest import POLICY, UPDATES, read_state
from dapo_megatron.learner.snapshot import ensure_state, model_state, optimizer_state, parts, set_steps, weights_state


def load_checkpoint(folder: Path, learner: Learner, part: str = POLICY) -> None:
    """Fill the learner's weights, and its optimizer if it has one, from a checkpoint written at any layout; collective.
    `part`: POLICY or CRITIC.

    Raises:
        RequestError: the checkpoint is of another model, has no such part, or no optimizer state where one is wanted.
    """
    _check_part(folder, part)
    with learner.groups.in_force():
        _load_learner(folder, learner, part)


def _load_learner(folder: Path, learner: Learner, part: str) -> None:
    optimizer = learner.optimizer
    if optimizer is not None:
        ensure_state(optimizer)
    models = model_state(learner)
    template = models | optimizer_state(optimizer, models, loading=True)
    with torch.no_grad():
        loaded = _load(template, folder, part)
        for v, model in enumerate(learner.models):
            model.load_state_dict(loaded[f"model{v}"], strict=False)
        if optimizer is not None:
            updates = int(read_state(folder)[UPDATES[part]])
            for own in parts(optimizer):
                _tolerate_step(own, loaded["optimizer"], updates)
            optimizer.load_state_dict(loaded["optimizer"])
            set_steps(optimizer, updates)


@torch.no_grad()
def load_weights(folder: Path, learner: Learner, part: str, values: Mapping[str, Tensor]) -> None:
    """Fill `values`, under the keys of `learner.weights`, from what `take_weights` left in a checkpoint written at any
    layout; exact, collective.

    Raises:
        RequestError: the checkpoint is of another model, or has no such part.
    """
    _check_part(folder, part)
    with learner.groups.in_force():
        loaded = _load(weights_state(learner, values), folder, part)
    for v, model in enumerate(learner.models):
        for name, _ in model.named_parameters():
            values[f"chunk{v}.{name}"].copy_(loaded[f"model{v}"][name])


def _check_part(folder: Path, part: str) -> None:
    if not (folder / part).is_dir():
        raise RequestError(f"{folder} holds no {part}: its run had none, or it was converted, which leaves one behind")


def _load(template: dict, folder: Path, part: str) -> dict:
    try:
        return dist_checkpointing.load(template, str(folder / part))
    except (CheckpointingException, CheckpointException, KeyError) as error:
        raise RequestError(f"{folder} does not fit this model: {str(error).splitlines()[0]}") from None


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
