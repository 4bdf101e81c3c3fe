"""Optimizer state and gradient buffers in host memory while rollouts are drawn, for engines on the learner's own GPUs.

On the device a parameter of a rank has 4 bytes of gradient, and of the optimizer, 1/data-parallel-size of it with
`optimizer.distributed`, 4 bytes of main weight (bf16 models) and 8 of moments. Gradients are not kept: every mini-batch
begins them anew. The rest is copied to host memory, pinned beside a GPU and used again every time. The weights stay,
for they are what goes to the engines.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from dapo_megatron.learner.learner import Learner
from dapo_megatron.learner.optimizer import parts
from dapo_megatron.learner.snapshot import HostMemory


class OptimizerMemory:
    """What some learners on one device need for updates alone. `offload`: whether it may leave the device at all; it
    then does at once, for engines that start beside it."""

    def __init__(self, learners: Sequence[Learner], *, offload: bool) -> None:
        self._learners = [learner for learner in learners if learner.optimizer is not None]
        self._offload = offload
        self._host = HostMemory()
        self._gradients: list[tuple[Tensor, int]] = []  # (gradient buffer without memory, its bytes)
        self._away = False
        self._put_away()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Inside, gradients and optimizer steps may be made; outside, checkpoints may be taken and weights read."""
        self._bring_back()
        try:
            yield
        finally:
            self._put_away()

    def _put_away(self) -> None:
        if self._away or not self._offload:
            return
        self._away = True
        self._host.rewind()
        for learner in self._learners:
            _replace(learner, self._host.copy)
            for chunk in learner.chunks:
                for buffer in _gradient_buffers(chunk):
                    self._gradients.append((buffer, buffer.untyped_storage().nbytes()))
        self._finish()  # the copies are whole before what they were made of goes
        for buffer, _ in self._gradients:
            buffer.untyped_storage().resize_(0)
        if any(learner.device.type == "cuda" for learner in self._learners):
            torch.cuda.empty_cache()  # an engine's process cannot use what this one's allocator keeps

    def _bring_back(self) -> None:
        if not self._away:
            return
        for buffer, size in self._gradients:
            buffer.untyped_storage().resize_(size)
            buffer.zero_()
        self._gradients.clear()
        for learner in self._learners:

            def to_device(tensor: Tensor, device: torch.device = learner.device) -> Tensor:
                return tensor.to(device, non_blocking=True, copy=True)

            _replace(learner, to_device)
        self._finish()
        self._away = False

    def _finish(self) -> None:
        for learner in self._learners:
            if learner.device.type == "cuda":
                torch.cuda.synchronize(learner.device)


def _replace(learner: Learner, copy: Callable[[Tensor], Tensor]) -> None:
    """Let main weights and moments be copies of themselves; the model's weights stay, which are the main weights of an
    fp32 model, too."""
    keep = {weight.untyped_storage().data_ptr() for weight in learner.weights.values()}
    for part in parts(learner.optimizer):
        inner = part.optimizer
        for group in inner.param_groups:
            for param in group["params"]:
                if param.untyped_storage().data_ptr() not in keep:
                    param.data = copy(param.data)
        for state in inner.state.values():
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim() > 0:  # AdamW keeps its step count on the CPU
                    state[key] = copy(value)


def _gradient_buffers(chunk: torch.nn.Module) -> list[Tensor]:
    if not isinstance(chunk, DistributedDataParallel):
        return []
    return [buffer.grad_data for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]]
