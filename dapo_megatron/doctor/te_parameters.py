"""Which parameters TransformerEngine's modules register, in order: megatron's layers of it are made of these.

Where the package is not installed tests build its modules from this table and hold plans to them; `doctor --parity`
holds it to the package where it is. Source: transformer_engine 2.11, pytorch/module/layernorm_linear.py, linear.py,
rmsnorm.py.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

VERSION = "2.11.0"
SUMMED = "gradient summed over tensor-parallel ranks"
IN, OUT, SHARDS = 96, 320, 2  # of the modules that are built to be looked at; no two products of them are equal


@dataclass(frozen=True)
class Slot:
    """A parameter. shape: of "in" and "out", the features of the whole module. cut: the dimension that is divided among
    tensor-parallel ranks, None for a parameter that all of them have whole. bias: only of modules that have one."""

    name: str
    shape: tuple[str, ...]
    cut: int | None = None
    bias: bool = False

    @property
    def mark(self) -> str:
        """How megatron must find it marked under sequence parallelism, for norms and sums of gradients."""
        return SUMMED if self.cut is None else f"cut along {self.cut}"

    def local_shape(self, *, inputs: int, outputs: int, shards: int) -> tuple[int, ...]:
        """Its shape on one of `shards` tensor-parallel ranks."""
        whole = [{"in": inputs, "out": outputs}[side] for side in self.shape]
        return tuple(size // shards if i == self.cut else size for i, size in enumerate(whole))


# (class, parallel_mode) → its parameters
MODULES: dict[tuple[str, str | None], tuple[Slot, ...]] = {
    ("LayerNormLinear", "column"): (  # normalization="RMSNorm"
        Slot("layer_norm_weight", ("in",)),
        Slot("weight", ("out", "in"), cut=0),
        Slot("bias", ("out",), cut=0, bias=True),
    ),
    ("Linear", "row"): (Slot("weight", ("out", "in"), cut=1), Slot("bias", ("out",), bias=True)),
    ("RMSNorm", None): (Slot("weight", ("in",)),),
    ("DotProductAttention", None): (),
}


def differences(pytorch: ModuleType, device: torch.device) -> list[str]:
    """How the modules of `transformer_engine.pytorch` differ from the table, a line each; built without a group, one
    of two tensor-parallel ranks. TransformerEngine builds on a GPU."""
    found = []
    for (kind, mode), slots in MODULES.items():
        for bias in (False, True) if any(slot.bias for slot in slots) else (False,):
            wanted = {
                slot.name: (slot.local_shape(inputs=IN, outputs=OUT, shards=SHARDS if mode else 1), slot.mark)
                for slot in slots
                if bias or not slot.bias
            }
            module = getattr(pytorch, kind)(**_arguments(kind, mode, bias, device))
            built = {name: (tuple(p.shape), _mark(p)) for name, p in module.named_parameters()}
            if list(built.items()) != list(wanted.items()):
                what = f"{kind}{f', {mode}-parallel' if mode else ''}{', with bias' if bias else ''}"
                found.append(f"{what}: has {_told(built)}, the table {_told(wanted)}")
    return found


def _arguments(kind: str, mode: str | None, bias: bool, device: torch.device) -> dict[str, Any]:
    if kind == "DotProductAttention":
        return {"num_attention_heads": 4, "kv_channels": 64, "num_gqa_groups": 2}
    dtype: dict[str, Any] = {"params_dtype": torch.bfloat16, "device": device}
    if kind == "RMSNorm":
        return {"normalized_shape": IN, "eps": 1e-6, "sequence_parallel": True, **dtype}
    norm = {"normalization": "RMSNorm"} if kind == "LayerNormLinear" else {}
    parallel = {"parallel_mode": mode, "tp_size": SHARDS, "sequence_parallel": True}
    return {"in_features": IN, "out_features": OUT, "bias": bias, **norm, **parallel, **dtype}


def _mark(parameter: torch.Tensor) -> str:
    if getattr(parameter, "tensor_model_parallel", False):
        return f"cut along {parameter.partition_dim}"
    return SUMMED if getattr(parameter, "sequence_parallel", False) else "not marked"


def _told(parameters: dict[str, tuple[tuple[int, ...], str]]) -> str:
    return "; ".join(f"{name} {list(shape)}, {mark}" for name, (shape, mark) in parameters.items()) or "no parameters"
