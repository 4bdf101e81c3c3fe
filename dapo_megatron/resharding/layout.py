"""A layout says, for each rank, which box of which canonical tensor lies where in its memory (or file).

Canonical tensors bear their Hugging Face names and shapes. A layout is data: it can be computed for any rank of any
world without that world existing.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

Box = tuple[tuple[int, int], ...]  # (start, stop) along each dimension


@dataclass(frozen=True, slots=True)
class Placement:
    """The box of the canonical tensor `name` lies in the local tensor `key` at `offset`, same shape, same order."""

    name: str
    box: Box
    key: str
    offset: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.box)


@dataclass(frozen=True)
class WeightLayout:
    """rank → its placements; `shapes`: canonical name → whole shape."""

    shapes: Mapping[str, tuple[int, ...]]
    placements: Mapping[int, tuple[Placement, ...]]

    def only(self, names: Collection[str]) -> "WeightLayout":
        """What it says of the named tensors."""
        wanted = set(names)
        return WeightLayout(
            {name: shape for name, shape in self.shapes.items() if name in wanted},
            {rank: tuple(p for p in placed if p.name in wanted) for rank, placed in self.placements.items()},
        )


def whole(shape: tuple[int, ...]) -> Box:
    """The box that is the whole tensor."""
    return tuple((0, size) for size in shape)


def volume(box: Box) -> int:
    """Elements of a box."""
    count = 1
    for start, stop in box:
        count *= stop - start
    return count


def intersect(a: Box, b: Box) -> Box | None:
    """The common box, or None."""
    common = tuple((max(p, r), min(q, s)) for (p, q), (r, s) in zip(a, b, strict=True))
    return common if all(start < stop for start, stop in common) else None
