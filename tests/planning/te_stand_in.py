"""A package that plays transformer_engine where it is not installed: modules that have the parameters of the committed
table and compute nothing, so that megatron's own layers of TransformerEngine can be built and counted."""

import sys
from types import ModuleType
from typing import Any

import torch

from dapo_megatron.doctor.te_parameters import MODULES, VERSION

UNUSED = {  # megatron asks for these names when it is imported
    "transformer_engine.common.recipe": ["DelayedScaling"],
    "transformer_engine.pytorch": ["GroupedLinear"],
    "transformer_engine.pytorch.attention": [],
    "transformer_engine.pytorch.attention.rope": ["apply_rotary_pos_emb", "apply_fused_qkv_rotary_pos_emb"],
    "transformer_engine.pytorch.distributed": ["CudaRNGStatesTracker", "activation_recompute_forward"],
    "transformer_engine.pytorch.fp8": ["FP8GlobalStateManager", "fp8_autocast"],
    "transformer_engine.pytorch.ops": ["Sequential", "FusibleOperation"],
    "transformer_engine.pytorch.router": [
        "fused_compute_score_for_moe_aux_loss",
        "fused_moe_aux_loss",
        "fused_topk_with_score_function",
    ],
    "transformer_engine.pytorch.tensor": ["QuantizedTensor"],
}


class _FromTable(torch.nn.Module):
    """Parameters of the table, marked as TransformerEngine marks them."""

    def __init__(
        self,
        in_features: int = 0,
        out_features: int = 0,
        *,
        parallel_mode: str | None = None,
        tp_size: int = 1,
        bias: bool = False,
        sequence_parallel: bool = False,
        params_dtype: torch.dtype = torch.float32,
        device: Any = None,
        normalization: str = "RMSNorm",
        **_: Any,
    ) -> None:
        super().__init__()
        assert normalization == "RMSNorm"
        self.use_bias, self.bias = bias, None
        for slot in MODULES[self.kind, parallel_mode]:
            if slot.bias and not bias:
                continue
            shape = slot.local_shape(inputs=in_features, outputs=out_features, shards=tp_size)
            parameter = torch.nn.Parameter(torch.empty(shape, dtype=params_dtype, device=device))
            if slot.cut is None:
                parameter.sequence_parallel = sequence_parallel
            else:
                parameter.tensor_model_parallel, parameter.partition_dim, parameter.partition_stride = True, slot.cut, 1
            delattr(self, "bias") if slot.bias else None
            self.register_parameter(slot.name, parameter)


class LayerNormLinear(_FromTable):
    """A norm and a linear behind it."""

    kind = "LayerNormLinear"


class Linear(_FromTable):
    """A linear."""

    kind = "Linear"


class RMSNorm(_FromTable):
    """A norm; `hidden_size` is the old name of `normalized_shape`."""

    kind = "RMSNorm"

    def __init__(self, normalized_shape: int | None = None, hidden_size: int | None = None, **options: Any) -> None:
        super().__init__(normalized_shape or hidden_size, **options)


class DotProductAttention(_FromTable):
    """Attention, which has no parameters."""

    kind = "DotProductAttention"


def install() -> ModuleType:
    """Put the package where `import transformer_engine` finds it, before megatron's layers are imported; returns its
    module `pytorch`."""
    modules = {}
    for name in ("transformer_engine", "transformer_engine.common", *UNUSED):
        module = modules.setdefault(name, ModuleType(name))
        module.__path__ = []  # a package, in which nothing else is found
        for unused in UNUSED.get(name, ()):
            setattr(module, unused, type(unused, (), {}))
    modules["transformer_engine"].__version__ = VERSION
    for kind in (LayerNormLinear, Linear, RMSNorm, DotProductAttention):
        setattr(modules["transformer_engine.pytorch"], kind.__name__, kind)
    for name, module in modules.items():
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(modules[parent], own, module)
    sys.modules.update(modules)
    return modules["transformer_engine.pytorch"]
