"""The learner's state at one moment: as it is, to be written at once, or copied to host memory, to be written while
training goes on.

Only the copy holds up training. Gathering the optimizer's shards, which takes many times as long, works on the copy.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.optimizer import DistributedOptimizer, MegatronOptimizer
from torch import Tensor

from dapo_megatron.learner.learner import Learner
from dapo_megatron.learner.optimizer import parts, set_rates

# loadable at another TP, PP and DP; gathered over gloo alone, by the one thread that saves
OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}

Object = TypeVar("Object")


class HostMemory:
    """Copies of tensors in host memory, which is used again for every snapshot: new pages cost more than the copy."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._used = 0

    def rewind(self) -> None:
        """Give up all copies."""
        self._used = 0

    def copy(self, tensor: Tensor) -> Tensor:
        """The tensor's values on the CPU; from a GPU they are there after the next `torch.cuda.synchronize`."""
        place, self._used = self._used, self._used + 1
        fits = place < len(self._buffers) and (
            self._buffers[place].shape == tensor.shape and self._buffers[place].dtype == tensor.dtype
        )
        if not fits:
            new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=tensor.is_cuda)
            self._buffers[place : place + 1] = [new]
        return self._buffers[place].copy_(tensor.detach(), non_blocking=tensor.is_cuda)


def take_snapshot(learner: Learner, memory: HostMemory | None) -> Callable[[], dict]:
    """The present weights and optimizer state, copied to `memory` or, without it, as they are.

    Returns a function that makes megatron's sharded state of them. It is collective over data-parallel ranks, on gloo
    groups that nothing else uses, and may be called once, in another thread if there is a copy.
    """
    with learner.groups.in_force():
        return _snapshot(learner, memory)


def _snapshot(learner: Learner, memory: HostMemory | None) -> Callable[[], dict]:
    if learner.optimizer is not None:
        ensure_state(learner.optimizer)
    models = model_state(learner)
    if memory is None:
        return lambda: models | optimizer_state(learner.optimizer, models)
    memory.rewind()
    copied = _copied(models, memory)
    if learner.optimizer is None:
        build = copied.copy
    elif all(isinstance(part, DistributedOptimizer) for part in parts(learner.optimizer)):
        frozen = _frozen(learner.optimizer, memory)

        def build() -> dict:
            # shards are placed by the identity of the live parameters; their values come from the copy
            return copied | optimizer_state(frozen, models)
    else:
        whole = copied | _copied(optimizer_state(learner.optimizer, models), memory)
        build = whole.copy
    if learner.device.type == "cuda":
        torch.cuda.synchronize(learner.device)
    return build


def take_weights(learner: Learner, values: Mapping[str, Tensor], memory: HostMemory | None) -> Callable[[], dict]:
    """As `take_snapshot` of weights that are not in the model: `values` under the keys of `learner.weights`."""
    state = weights_state(learner, values)
    if memory is not None:
        memory.rewind()
        state = _copied(state, memory)
        if learner.device.type == "cuda":
            torch.cuda.synchronize(learner.device)
    return state.copy


def weights_state(learner: Learner, values: Mapping[str, Tensor]) -> dict:
    """`model_state` with `values` in the place of the weights, in their own dtype."""
    return {
        part: {
            name: _holding(leaf, values[key]) if (key := f"{part.replace('model', 'chunk')}.{name}") in values else leaf
            for name, leaf in leaves.items()
        }
        for part, leaves in model_state(learner).items()
    }


def _holding(leaf: ShardedTensor | ShardedTensorFactory, value: Tensor) -> ShardedTensor | ShardedTensorFactory:
    twin = copy.copy(leaf)
    twin.data = value
    if isinstance(twin, ShardedTensor):
        twin.dtype = value.dtype
    return twin


def model_state(learner: Learner) -> dict:
    """megatron's sharded state of the weights; chunks of a virtual pipeline number their layers globally, so one name
    space serves all."""
    return {f"model{v}": model.sharded_state_dict() for v, model in enumerate(learner.models)}


def optimizer_state(optimizer: MegatronOptimizer | None, models: dict, *, loading: bool = False) -> dict:
    """{"optimizer": megatron's sharded state of it}, empty without an optimizer."""
    if optimizer is None:
        return {}
    merged = models["model0"] if len(models) == 1 else dict(models)
    return {"optimizer": optimizer.sharded_state_dict(merged, is_loading=loading, metadata=OPTIMIZER_FORMAT)}


def ensure_state(optimizer: MegatronOptimizer) -> None:
    """AdamW has no moments before its first step, and megatron's sharded state needs them: zeros, weights untouched."""
    for part in parts(optimizer):
        if part.optimizer.state:
            continue
        if isinstance(part, DistributedOptimizer):
            set_rates(part, 0.0, 0.0)
            part._init_optimizer_states_with_dummy_values()
        else:
            part.init_state_fn(part.optimizer, part.config)
        set_steps(part, 0)


def set_steps(optimizer: MegatronOptimizer, updates: int) -> None:
    """megatron leaves a wrong `step`, or none, in torch's AdamW after loading: bias correction would drift."""
    for part in parts(optimizer):
        inner = part.optimizer
        for state in inner.state.values():
            if isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
                state["step"] = torch.tensor(float(updates))
        for group in inner.param_groups:
            if "step" in group:
                group["step"] = updates


def _copied(state: dict, memory: HostMemory) -> dict:
    def copy_leaf(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return memory.copy(leaf)
        if isinstance(leaf, ShardedTensor | ShardedTensorFactory):
            twin = copy.copy(leaf)
            twin.data = None if leaf.data is None else memory.copy(leaf.data)
            return twin
        return copy.deepcopy(leaf)

    return dict_list_map_outplace(copy_leaf, state)


def _frozen(optimizer: MegatronOptimizer, memory: HostMemory) -> MegatronOptimizer:
    """The optimizer around copies of its state."""
    frozen = _shallow(optimizer)
    if hasattr(optimizer, "chained_optimizers"):
        frozen.chained_optimizers = [_frozen(part, memory) for part in optimizer.chained_optimizers]
        return frozen
    inner = _shallow(optimizer.optimizer)
    inner.state, inner.param_groups = {}, []
    for group in optimizer.optimizer.param_groups:
        params = [memory.copy(p) for p in group["params"]]
        inner.param_groups.append({**group, "params": params})
        for live, copied in zip(group["params"], params, strict=True):
            state = optimizer.optimizer.state[live]
            inner.state[copied] = {k: memory.copy(v) if isinstance(v, Tensor) else v for k, v in state.items()}
    frozen.optimizer = inner
    return frozen


def _shallow(thing: Object) -> Object:
    """A new object of the same attributes; copy.copy would run the optimizer's own ideas of copying."""
    twin = object.__new__(type(thing))
    twin.__dict__.update(thing.__dict__)
    return twin
