"""The reference policy: weights beside the policy's, fixed or following it, that score responses.

Each rank keeps its own shard, in host memory (pinned beside a GPU), from where it is swapped into the model while that
scores, or in a second model that is always there. Nothing else is copied: activations are those of one forward pass.

| placement | on the host, bytes a parameter | on the device | a scoring pass |
| --- | --- | --- | --- |
| host | those of `model.dtype`; 4 more for `ema` in bf16 | one tensor at a time | swaps twice |
| resident | 4 for `ema` | 2: bf16, whatever `model.dtype` is | swaps nothing |
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from dapo_megatron.config.algorithm import Reference
from dapo_megatron.learner.learner import Learner
from dapo_megatron.resharding.hf_files import read_placements


class ReferenceWeights:
    """This rank's shard of the reference. It begins as the learner's weights as they are now, or as those of a Hugging
    Face folder, which are the same at every layout.

    Args:
        settings: how it follows the policy, by `move`.
        resident: with placement=resident the model that holds it; `in_place` then never touches the learner.

    Raises:
        RequestError: the folder lacks a tensor.
    """

    def __init__(
        self,
        learner: Learner,
        settings: Reference | None = None,
        *,
        resident: Learner | None = None,
        folder: Path | None = None,
    ) -> None:
        self._learner, self._settings, self._resident = learner, settings or Reference(), resident
        self._held = _on_host(learner) if resident is None else resident.weights
        # bf16 keeps 8 bits of a number: a step of 1/1000 of a difference would be lost in it
        summed = self._settings.kind == "ema" and any(held.dtype is not torch.float32 for held in self._held.values())
        self.values: Mapping[str, Tensor] = _on_host(learner, torch.float32) if summed else self._held
        """What a checkpoint must hold: fp32 sums of a moving average, else the weights themselves."""
        if folder is not None:
            read_placements(folder, learner.weight_layout.placements[dist.get_rank()], self.values)
        else:
            for key, weight in learner.weights.items():
                self.values[key].copy_(weight)
        self.settle()

    @property
    def moves(self) -> bool:
        """Whether it follows the policy, so that its log-probs of a response do not last."""
        return self._settings.moves

    @torch.no_grad()
    def settle(self) -> None:
        """Score with `values` from now on; called where they were filled from outside."""
        if self.values is not self._held:
            for key, held in self._held.items():
                held.copy_(self.values[key])

    @contextmanager
    def in_place(self) -> Iterator[Learner]:
        """Inside, the model given is the reference; afterwards the learner's is what it was, to the bit."""
        if self._resident is not None:
            yield self._resident
            return
        self._swap()
        try:
            yield self._learner
        finally:
            self._swap()

    @torch.no_grad()
    def move(self, step: int) -> float:
        """Follow the policy after rollout step `step` (from 1); collective.

        ema: π_ref ← τ·π_ref + (1 − τ)·π, fp32, each rank on its own shard; periodic: π_ref ← π where `every` divides
        the step; fixed: nothing.

        Returns:
            ‖change‖ / ‖π_ref before it‖ over all weights of the whole model, the same for every layout.
        """
        settings = self._settings
        if settings.kind == "fixed" or (settings.kind == "periodic" and step % settings.every):
            return 0.0
        share = 1.0 - settings.decay if settings.kind == "ema" else 1.0
        counted, device = _counted(self._learner), self._learner.device
        squares = torch.zeros(2, dtype=torch.float64, device=device)
        for key, weight in self._learner.weights.items():
            before = self.values[key].to(device, torch.float32)
            after = torch.lerp(before, weight.float(), share)
            if key in counted:
                squares += torch.stack([_square(after - before), _square(before)])
            self.values[key].copy_(after)
            if self.values is not self._held:
                self._held[key].copy_(after)
        if dist.get_world_size() > 1:
            dist.all_reduce(squares)  # data-parallel copies count alike above and below the line
        change, size = squares.sqrt().tolist()
        return change / size if size else 0.0

    @torch.no_grad()
    def _swap(self) -> None:
        for key, weight in self._learner.weights.items():
            present: Tensor = weight.clone()
            weight.copy_(self._held[key])
            self._held[key].copy_(present)


def _on_host(learner: Learner, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    on_gpu = learner.device.type == "cuda"
    return {
        key: torch.empty(weight.shape, dtype=dtype or weight.dtype, pin_memory=on_gpu)
        for key, weight in learner.weights.items()
    }


def _counted(learner: Learner) -> set[str]:
    """Keys of the weights that this rank counts: neither copies of the first tensor-parallel rank's nor the second of
    two tied ones."""
    return {
        f"chunk{v}.{name}"
        for v, model in enumerate(learner.models)
        for name, weight in model.named_parameters()
        if param_is_not_shared(weight) and param_is_not_tensor_parallel_duplicate(weight)
    }


def _square(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dtype=torch.float64).square()
