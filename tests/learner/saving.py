"""Run on ranks: a checkpoint with a name of its own, written while the caller waits."""

from collections.abc import Sequence
from pathlib import Path

import torch.distributed as dist

from dapo_megatron.config.checkpoint import Checkpoint
from dapo_megatron.data.completions import PromptGroup
from dapo_megatron.learner.checkpoint_saver import CheckpointSaver
from dapo_megatron.learner.learner import Learner
from dapo_megatron.learner.manifest import checkpoint_folder
from dapo_megatron.learner.reference import ReferenceWeights


def save_as(
    folder: Path,
    learner: Learner,
    state: dict,
    *,
    side_files: Path,
    groups: Sequence[PromptGroup] = (),
    reference: ReferenceWeights | None = None,
) -> None:
    """A checkpoint of the present at `folder`; collective."""
    run = folder.with_name(f"{folder.name}-run")
    CheckpointSaver(Checkpoint(asynchronous=False), learner, run, side_files=side_files).save(state, groups, reference)
    if dist.get_rank() == 0:
        checkpoint_folder(run, state["step"]).rename(folder)
    dist.barrier()
