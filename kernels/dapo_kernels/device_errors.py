"""Bad input noticed on a GPU: the kernels set a flag in device memory, and whoever steps the optimizer reads it once an
update. Nothing waits for the device in between; the affected numbers are NaN, never plausible."""

from typing import NamedTuple

import torch
from torch import Tensor


class NonFiniteLogits(ValueError):
    """A row of logits on a CPU, where looking costs no wait, holds a NaN, a +inf or nothing but −inf."""


class DeviceErrors(NamedTuple):
    """What was seen since the flags were last read."""

    target: bool
    """a target outside the vocabulary"""
    logits: bool
    """a row with a NaN, a +inf or nothing but −inf"""
    setting: bool
    """a negative or NaN weight, a denominator or temperature that is not above 0, `rows` without a row of weight"""
    gradient_scale: bool
    """a backward pass of a fused linear loss under another factor than the `gradient_scale` it was told"""

    def __bool__(self) -> bool:
        return any(tuple(self))

    def __str__(self) -> str:
        sentences = (
            "a target lies outside the vocabulary",
            "a row of logits holds a NaN, a +inf or nothing but -inf",
            "a weight is negative or NaN, a denominator or temperature is not above 0, or rows of weight were left out",
            "a fused linear loss was differentiated under another factor than its gradient_scale",
        )
        return "; ".join(s for s, seen in zip(sentences, tuple(self), strict=True) if seen) or "none"


_FLAGS: dict[torch.device, Tensor] = {}


def device_flags(device: torch.device) -> Tensor:
    """int32 [4] on `device`, in the order of DeviceErrors; kernels store 1."""
    if device not in _FLAGS:
        with torch.inference_mode(False):  # they outlive the mode that the first op may run in
            _FLAGS[device] = torch.zeros(4, dtype=torch.int32, device=device)
    return _FLAGS[device]


def note_on_device(device: torch.device, kind: str, seen: Tensor) -> None:
    """Set flag `kind` (a field of DeviceErrors) where the bool scalar `seen` is true; no synchronisation."""
    flag = device_flags(device)[DeviceErrors._fields.index(kind)]
    flag.copy_(torch.maximum(flag, seen.to(flag.dtype)))


def device_errors() -> DeviceErrors:
    """Read and clear the flags of every device. The one place that waits for the device: call it once an update."""
    found = torch.zeros(4, dtype=torch.int32)
    for flags in _FLAGS.values():
        found = torch.maximum(found, flags.cpu())
        flags.zero_()
    return DeviceErrors(*(bool(value) for value in found))
