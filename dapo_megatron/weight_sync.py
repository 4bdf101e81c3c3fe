"""Learner weights into the embedded engine, by a resharding plan that is made once; engine_sync.py is for servers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dapo_megatron.config import Recipe
from dapo_megatron.learner.learner import Learner
from dapo_megatron.resharding.hf_files import file_groups, write_folder
from dapo_megatron.resharding.hf_layout import whole_layout
from dapo_megatron.resharding.plan import make_plan
from dapo_megatron.resharding.transport import Transfer, Transport

if TYPE_CHECKING:
    from dapo_megatron.rollout.hf_engine import HFEngine

HF_FILE_BYTES = 4 << 30


class WeightSync:
    """Megatron shards of all ranks → the whole Hugging Face model that each rank's engine holds."""

    def __init__(self, recipe: Recipe, learner: Learner, engine: "HFEngine", rank: int) -> None:
        settings = recipe.resharding
        self.learner, self.engine, self.enabled = learner, engine, settings.enabled
        target = whole_layout(learner.architecture, range(learner.layout.world))
        self.plan = make_plan(learner.weight_layout, target)
        self.transport = Transport(
            self.plan,
            rank,
            dtype=learner.dtype,
            device=learner.device,
            bucket_bytes=settings.bucket_mib << 20,
            window=settings.window,
            time_limit_s=settings.time_limit_s,
        )
        self._synced_once = False

    def push(self, version: int) -> Transfer | None:
        """Write the present weights into the engine as policy `version`; None when `resharding.enabled` is false.

        The first push always happens: an engine starts without weights.
        """
        if self._synced_once and not self.enabled:
            return None
        transfer = self.transport.run(self.learner.weights, self.engine.weights)
        self.engine.update_weights(version)
        self._synced_once = True
        return transfer

    def give_way(self) -> None:
        """Nothing to give: the embedded engine keeps its weights."""

    def close(self) -> None:
        """Nothing to let go of."""


def export_hugging_face(learner: Learner, folder: Path, *, side_files: Path, time_limit_s: float) -> None:
    """Write the present weights as a Hugging Face folder, a file at a time through rank 0; collective. A critic becomes
    a token classifier of one label."""
    groups = list(file_groups(learner.weight_layout.shapes, learner.dtype.itemsize, HF_FILE_BYTES))
    write_folder(
        folder,
        groups,
        lambda names: whole_on_rank_zero(
            learner, learner.weights, names, dtype=learner.dtype, time_limit_s=time_limit_s
        ),
        side_files=side_files,
        dtype=learner.dtype,
        value_head=learner.architecture.value_head,
    )
    torch.distributed.barrier()


def whole_on_rank_zero(
    learner: Learner, local: Mapping[str, Tensor], names: Sequence[str], *, dtype: torch.dtype, time_limit_s: float
) -> dict[str, Tensor] | None:
    """The named canonical tensors whole on rank 0 (None elsewhere), from each rank's `local` tensors by layout key;
    collective.

    `local` is the learner's weights, or anything of their shapes (gradients). For writing files a group at a time.
    """
    target = whole_layout(learner.architecture, [0], names)
    rank = torch.distributed.get_rank()
    transport = Transport(
        make_plan(learner.weight_layout.only(names), target),
        rank,
        dtype=dtype,
        device=learner.device,
        bucket_bytes=1 << 28,
        window=256,
        time_limit_s=time_limit_s,
    )
    whole = {name: torch.empty(shape, dtype=dtype, device=learner.device) for name, shape in target.shapes.items()}
    transport.run(local, whole if rank == 0 else {})
    return whole if rank == 0 else None
