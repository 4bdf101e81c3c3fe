"""Which changes of dtype on the way are allowed: digits may be lost, range may not."""

import torch

from dapo_megatron.errors import RunError

EXPONENT_BITS = {torch.float64: 11, torch.float32: 8, torch.bfloat16: 8, torch.float16: 5}


def check_range_kept(name: str, source: torch.dtype, target: torch.dtype) -> None:
    """Refuse to turn the tensor `name` of dtype `source` into one whose range is smaller, as float32 → float16.

    float32 → bfloat16 keeps the range and is allowed. Dtypes that are not in EXPONENT_BITS may not change at all.

    Raises:
        RunError: names the tensor, both dtypes and those that would do.
    """
    if source == target or EXPONENT_BITS.get(source, 99) <= EXPONENT_BITS.get(target, 0):
        return
    fitting = [d for d, bits in EXPONENT_BITS.items() if bits >= EXPONENT_BITS.get(source, 99)] or [source]
    raise RunError(
        f"resharding: {name} is {_name(source)} and would lose range as {_name(target)}; "
        f"use {' or '.join(map(_name, fitting))}"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
