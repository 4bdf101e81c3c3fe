"""What every op checks and derives from its arguments before it touches a logit."""

from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

IMPLEMENTATIONS = ("auto", "torch", "triton")


class Shard(NamedTuple):
    """Which global columns this rank holds: `first` is the global id of column 0, `valid` columns are inside the
    vocabulary of `vocabulary` entries."""

    first: int
    valid: int
    vocabulary: int


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic on logits of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def choose_implementation(implementation: str, device: torch.device, dtype: torch.dtype) -> str:
    """ "torch" or "triton" for logits of that dtype on that device.

    "auto" is Triton on a GPU where it is installed, and torch elsewhere and for fp64.

    Raises:
        ValueError: an unknown name, or Triton asked for where it cannot run.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} is not known; use 'auto', 'torch' or 'triton'")
    installed = find_spec("triton") is not None
    if implementation == "auto":
        return "triton" if installed and device.type == "cuda" and dtype != torch.float64 else "torch"
    if implementation == "triton":
        if not installed:
            raise ValueError("implementation='triton' needs the package triton; install it, or use 'auto' or 'torch'")
        if dtype == torch.float64:
            raise ValueError("implementation='triton' computes in fp32; for fp64 logits use 'auto' or 'torch'")
        if device.type != "cuda":
            from dapo_kernels.triton_rows import INTERPRETED

            if not INTERPRETED:
                raise ValueError(
                    f"implementation='triton' needs tensors on a GPU, not on {device}; use 'auto' or 'torch', "
                    "or start the process with TRITON_INTERPRET=1"
                )
    return implementation


def check_vectors(count: int, device: torch.device, **vectors: Tensor) -> None:
    """Each must be a float vector [count] on `device`; ValueError names the one that is not."""
    for name, value in vectors.items():
        if value.shape != (count,) or not value.is_floating_point():
            raise ValueError(f"{name} must be float {(count,)}; got {value.dtype} {tuple(value.shape)}")
        if value.device != device:
            raise ValueError(f"{name} is on {value.device}, the logits are on {device}")


def check_logits(logits: Tensor) -> None:
    """ValueError unless [N, V/TP], contiguous, bf16, fp16, fp32 or fp64."""
    if logits.dim() != 2 or not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous [N, V/TP]; got {tuple(logits.shape)}, strides {logits.stride()}")
    if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"logits must be bf16, fp16, fp32 or fp64; got {logits.dtype}")


def check_rows(count: int, device: torch.device, targets: Tensor, row_mask: Tensor | None) -> None:
    """ValueError unless targets are int64 [count], row_mask bool [count] or None, both on `device`."""
    if targets.shape != (count,) or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [{count}]; got {targets.dtype} {tuple(targets.shape)}")
    if row_mask is not None and (row_mask.shape != (count,) or row_mask.dtype != torch.bool):
        raise ValueError(f"row_mask must be bool [{count}]; got {row_mask.dtype} {tuple(row_mask.shape)}")
    for name, value in (("targets", targets), ("row_mask", row_mask)):
        if value is not None and value.device != device:
            raise ValueError(f"{name} is on {value.device}, the logits are on {device}")


def check_on_cpu(targets: Tensor, temperature: float | Tensor, vocabulary: int, row_mask: Tensor | None) -> None:
    """The values themselves, in rows asked for: ValueError for a target outside the vocabulary or a temperature ≤ 0.
    Nothing on a GPU, where looking would mean waiting: there the kernels set a flag (device_errors)."""
    if targets.device.type != "cpu":
        return
    asked = targets if row_mask is None else targets[row_mask]
    if asked.numel() and (int(asked.min()) < 0 or int(asked.max()) >= vocabulary):
        raise ValueError(f"targets must lie in 0..{vocabulary - 1}; found {int(asked.min())}..{int(asked.max())}")
    if isinstance(temperature, Tensor):
        used = temperature[row_mask] if temperature.dim() and row_mask is not None else temperature
        if not bool((used > 0).all()):
            raise ValueError("temperature must be > 0 in every row asked for")


def check_loss_on_cpu(loss_mask: Tensor, denominator: float | Tensor) -> None:
    """ValueError for a denominator ≤ 0 or a negative or NaN weight; a tensor on a GPU is left to the kernels' flags."""
    if isinstance(denominator, Tensor) and denominator.numel() != 1:
        raise ValueError(f"denominator must be one number; got shape {tuple(denominator.shape)}")
    on_cpu = loss_mask.device.type == "cpu"
    if (on_cpu or not isinstance(denominator, Tensor)) and not float(denominator) > 0:
        raise ValueError(f"denominator={float(denominator)} must be > 0: the weight sum of the whole mini-batch")
    if on_cpu and loss_mask.numel() and not float(loss_mask.min()) >= 0:  # a NaN as well
        raise ValueError(f"loss_mask holds {float(loss_mask.min())}; weights must be >= 0")


def kernel_temperature(temperature: float | Tensor, count: int, like: Tensor) -> float | Tensor:
    """1/T as the kernels take it: a number as it is, since a tensor would be one to fill; else in the compute dtype
    of `like` and on its device, 0-dimensional or [count].

    Raises:
        ValueError: a number that is not > 0, or a tensor that is neither.
    """
    if not isinstance(temperature, Tensor):
        if not 1e-38 < temperature < 1e38:
            raise ValueError(f"temperature={temperature} must be > 0, and finite as is its inverse")
        return 1.0 / temperature
    if temperature.dim() not in (0, 1):
        raise ValueError(f"temperature must be a number or one a row; got shape {tuple(temperature.shape)}")
    if temperature.dim() == 1 and temperature.shape[0] != count:
        raise ValueError(f"temperature has {temperature.shape[0]} entries for {count} rows")
    return temperature.to(device=like.device, dtype=compute_dtype(like.dtype)).reciprocal().contiguous()


def inverse_temperature(temperature: float | Tensor, count: int, like: Tensor) -> Tensor:
    """`kernel_temperature` as a tensor in any case.

    Raises:
        ValueError: likewise.
    """
    inverse = kernel_temperature(temperature, count, like)
    if isinstance(inverse, Tensor):
        return inverse
    return torch.full((), inverse, dtype=compute_dtype(like.dtype), device=like.device)  # a fill: no copy to wait for


def shard_of(columns: int, vocab_size: int | None, group: dist.ProcessGroup | None) -> Shard:
    """This rank's share of the columns.

    Raises:
        ValueError: vocab_size lies outside 1..columns of all ranks.
    """
    size, rank = (1, 0) if group is None else (group.size(), group.rank())
    vocabulary = size * columns if vocab_size is None else vocab_size
    if not 0 < vocabulary <= size * columns:
        raise ValueError(f"vocab_size={vocab_size} must lie in 1..{size * columns}, the columns of all ranks")
    first = rank * columns
    return Shard(first, max(0, min(columns, vocabulary - first)), vocabulary)


def refuse_second_derivative() -> None:
    """For the backward of an op whose gradient is a constant to autograd: RuntimeError under create_graph."""
    if torch.is_grad_enabled():
        raise RuntimeError("the losses of dapo_kernels have no second derivative: call backward without create_graph")


def group_of_many(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """None for a group of one: nobody to talk to."""
    return group if group is not None and group.size() > 1 else None
