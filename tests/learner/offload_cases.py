"""Run on ranks: updates whose optimizer state is in host memory in between, beside updates that leave it alone."""

from pathlib import Path

import torch
from torch import Tensor

from dapo_megatron.config.optimizer import Optimizer
from dapo_megatron.learner.checkpoint import load_checkpoint
from dapo_megatron.learner.learner import Learner
from dapo_megatron.learner.offload import OptimizerMemory, _gradient_buffers
from dapo_megatron.learner.snapshot import parts
from tests.learner.batches import load_batch
from tests.learner.checkpoint_cases import SETTINGS, _update
from tests.learner.layouts import build
from tests.learner.saving import save_as


def state_of(learner: Learner) -> list[Tensor]:
    """Weights, main weights and moments of this rank."""
    tensors = list(learner.weights.values())
    for part in parts(learner.optimizer):
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                state = part.optimizer.state[param]  # in another order after loading
                tensors += [param.data, *(state[key] for key in sorted(state) if isinstance(state[key], Tensor))]
    return [tensor.clone() for tensor in tensors]


def gradient_bytes(learner: Learner) -> int:
    return sum(g.untyped_storage().nbytes() for chunk in learner.chunks for g in _gradient_buffers(chunk))


def away_between_updates(payload: dict) -> dict[str, dict[str, bool]]:
    """What held on this rank, by dtype and kind of optimizer."""
    batch, out = load_batch(payload["batch"]), Path(payload["out"])
    found = {}
    for dtype, distributed in ((torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)):
        settings = Optimizer(distributed=distributed, **SETTINGS)

        def make(settings=settings, dtype=dtype) -> Learner:
            return build(payload["model"], payload["layout"], budget=150, train=settings, dtype=dtype)

        name = f"{dtype}|{distributed}"
        plain = make()
        for _ in range(2):
            _update(plain, batch)
        before_third = state_of(plain)
        _update(plain, batch)
        after_third = state_of(plain)

        moving = make()
        whole = gradient_bytes(moving)
        memory = OptimizerMemory([moving], offload=True)  # it leaves at once, before there are moments
        places = []
        for _ in range(2):
            with memory.on_device():
                _update(moving, batch)
                places.append([tensor.data_ptr() for tensor in _movable(moving)])
            places.append([tensor.data_ptr() for tensor in _movable(moving)])
        held = {
            "gradients are let go": whole > 0 and gradient_bytes(moving) == 0,
            "everything moved": all(a != b for a, b in zip(places[2], places[3], strict=True)),
            "host memory is used again": places[1][:1] == places[3][:1] or dtype is torch.float32,
            "equal while away": _equal(state_of(moving), before_third),
        }
        folder = out / f"step-{name}"
        save_as(folder, moving, {"step": 0, "updates": 2}, side_files=Path(payload["model"]))
        with memory.on_device():
            _update(moving, batch)
        held["equal after coming back"] = _equal(state_of(moving), after_third)
        loaded = make()
        load_checkpoint(folder, loaded)
        held["a checkpoint taken while away goes on"] = _equal(state_of(loaded), before_third)
        found[name] = held
    return found


def _movable(learner: Learner) -> list[Tensor]:
    """Moments, and main weights where they are not the model's own."""
    own = {weight.untyped_storage().data_ptr() for weight in learner.weights.values()}
    tensors = []
    for part in parts(learner.optimizer):
        for group in part.optimizer.param_groups:
            for param in group["params"]:
                state = part.optimizer.state[param].values()
                tensors += [param.data] if param.untyped_storage().data_ptr() not in own else []
                tensors += [value for value in state if isinstance(value, Tensor) and value.dim() > 0]
    return tensors


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
