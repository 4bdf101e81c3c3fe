"""A checksum of a slice's bits, the same on every device, layout and chunking: proof that a slice has arrived.

    sum over elements i of bits_i · (2·i + 1)·ODD   (mod 2⁶⁴)

Odd factors: a change of any one element always shows; different factors: so do swapped elements. Not a defence against
malice.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

ODD = 0x9E3779B97F4A7C15 - (1 << 64)  # 2⁶⁴ / golden ratio as int64
CHUNK = 1 << 20  # elements looked at at once: 24 MB of scratch
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@torch.no_grad()
def checksum(view: Tensor) -> int:
    """The checksum of a tensor's elements in order, strided or not; an int64."""
    total = torch.zeros((), dtype=torch.int64, device=view.device)
    first = 0
    for chunk in _chunks(view):
        bits = chunk.reshape(-1).view(_BITS[view.dtype.itemsize]).to(torch.int64)
        factors = torch.arange(first, first + bits.numel(), device=view.device).mul_(2).add_(1).mul_(ODD)
        total += bits.mul_(factors).sum()
        first += bits.numel()
    return int(total)


def _chunks(view: Tensor) -> Iterator[Tensor]:
    if view.numel() <= CHUNK:
        yield view
        return
    inner = view[0].numel()
    if inner > CHUNK:
        for row in view:
            yield from _chunks(row)
        return
    yield from view.split(max(1, CHUNK // inner))
