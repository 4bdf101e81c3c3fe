"""Where no GPU is present, "cuda" means "cpu" to megatron-core 0.16: the one place that knows megatron expects CUDA.

Groups 1, 2 and 4 patch torch for the whole process, group 3 only the named megatron modules. A TorchFunctionMode will
not do: it is popped while Tensor.backward runs, so recomputation fails. The parity tests stand guard over this file.
"""

import functools
import sys

import torch

_CPU = torch.device("cpu")
_HARD_CODED = (
    "pipeline_parallel.schedules",
    "optimizer.optimizer",
    "optimizer.clip_grads",
    "optimizer.grad_scaler",
    "transformer.utils",
    "utils",
)


class _TorchOnCpu:
    """Stands in for the global `torch` of the megatron modules that write device="cuda"."""

    def __init__(self) -> None:
        for name in ("tensor", "zeros", "ones", "empty", "full", "empty_like", "zeros_like"):
            setattr(self, name, self._without_cuda(getattr(torch, name)))

    @staticmethod
    def _without_cuda(function):
        @functools.wraps(function)
        def wrapped(*args, device=None, **kwargs):
            if device is not None and torch.device(device).type == "cuda":
                device = _CPU
            return function(*args, device=device, **kwargs)

        return wrapped

    def __getattr__(self, name: str):
        return getattr(torch, name)


def _import_uncompiled() -> None:
    """Import megatron with torch.compile left out of its decorators: the fused functions behind them are not used on a
    CPU, and torch's compiler takes seconds to import."""
    compiled = torch.compile
    torch.compile = lambda function=None, **_: function if function is not None else lambda given: given
    try:
        import megatron.core.models.gpt.gpt_model
        import megatron.core.optimizer  # noqa: F401
    finally:
        torch.compile = compiled


def install() -> None:
    """Patch once; does nothing where a GPU is present."""
    if torch.cuda.is_available() or getattr(torch, "_dapo_megatron_on_cpu", False):
        return
    torch._dapo_megatron_on_cpu = True

    _import_uncompiled()

    # 1. the current device is the CPU
    torch.cuda.current_device = lambda: _CPU
    torch.cuda.synchronize = lambda *args, **kwargs: None

    # 2. random-number tracker on the CPU generator
    import megatron.core.tensor_parallel.random as megatron_random

    torch.cuda.manual_seed = torch.manual_seed
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)

    # 3. hard-coded device="cuda"
    import megatron.core.optimizer.clip_grads
    import megatron.core.optimizer.grad_scaler
    import megatron.core.optimizer.optimizer
    import megatron.core.pipeline_parallel.schedules
    import megatron.core.transformer.utils  # noqa: F401

    on_cpu = _TorchOnCpu()
    for module in _HARD_CODED:
        sys.modules[f"megatron.core.{module}"].torch = on_cpu

    # 4. type names ("torch.cuda.FloatTensor") and .cuda()
    original_type = torch.Tensor.type

    def type_with_cuda_name(self, dtype=None, **kwargs):
        if dtype is not None:
            return original_type(self, dtype, **kwargs)
        return original_type(self).replace("torch.", "torch.cuda.", 1)

    torch.Tensor.type = type_with_cuda_name
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
