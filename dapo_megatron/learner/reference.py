"""The reference policy: frozen weights in host memory, swapped into the model while it is scored.

Each rank keeps its own shard: `model.dtype`'s bytes a parameter of it (2 in bf16, 4 in fp32) of host memory, pinned
beside a GPU; on the device nothing but one tensor at a time during a swap. A scoring pass swaps twice.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_megatron.learner.learner import Learner
from dapo_megatron.resharding.hf_files import read_placements


class ReferenceWeights:
    """This rank's shard of the reference: a copy of the learner's weights as they are now, or those of a Hugging Face
    folder, which are the same at every layout.

    Raises:
        RequestError: the folder lacks a tensor.
    """

    def __init__(self, learner: Learner, folder: Path | None = None) -> None:
        self._learner = learner
        on_gpu = learner.device.type == "cuda"
        self._held = {
            key: torch.empty(weight.shape, dtype=weight.dtype, pin_memory=on_gpu)
            for key, weight in learner.weights.items()
        }
        if folder is not None:
            read_placements(folder, learner.weight_layout.placements[dist.get_rank()], self._held)
        else:
            for key, weight in learner.weights.items():
                self._held[key].copy_(weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the learner's model is the reference; afterwards it is what it was, to the bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for key, weight in self._learner.weights.items():
            present: Tensor = weight.clone()
            weight.copy_(self._held[key])
            self._held[key].copy_(present)
