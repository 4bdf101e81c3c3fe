"""The moves that turn one layout into another: every destination element from exactly one source.

The nearest source is taken, then the least busy.
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from dapo_megatron.errors import RunError
from dapo_megatron.resharding.layout import Box, Placement, WeightLayout, intersect, volume


@dataclass(frozen=True, slots=True)
class Move:
    """`shape` elements of tensor `name` from (source rank, key, offset) to (target rank, key, offset)."""

    name: str
    shape: tuple[int, ...]
    source_rank: int
    source_key: str
    source_offset: tuple[int, ...]
    target_rank: int
    target_key: str
    target_offset: tuple[int, ...]

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True)
class Plan:
    """All moves, in one order that every rank shares."""

    moves: tuple[Move, ...]

    @cached_property
    def elements_moved(self) -> int:
        """Elements that change process."""
        return sum(move.elements for move in self.moves if move.source_rank != move.target_rank)


def make_plan(source: WeightLayout, target: WeightLayout) -> Plan:
    """Intersect two layouts over the same ranks of one world (rank i of both is one process).

    A slice that lies in the destination's own process is taken from there; other slices come from the replica that has
    sent least so far.

    Raises:
        RunError: a tensor of one side unknown to the other, shapes that differ, a destination element with no source or
            two.
    """
    _check_same_tensors(source, target)
    boxes = _boxes_by_name(source)
    sent: dict[int, int] = defaultdict(int)
    moves: list[Move] = []
    for rank in sorted(target.placements):
        for wanted in target.placements[rank]:
            parts: list[Box] = []
            for box, holders in boxes[wanted.name].items():
                common = intersect(box, wanted.box)
                if common is None:
                    continue
                # counted elements alone would let an overlap make up for a hole
                if any(intersect(common, other) is not None for other in parts):
                    raise RunError(
                        f"resharding: {wanted.name} {common} of rank {rank} ({wanted.key}) has two "
                        "different sources: slices of "
                        "the source layout overlap"
                    )
                parts.append(common)
                giver = rank if rank in holders else min(holders, key=lambda r: (sent[r], r))
                move = _move(wanted, common, giver, holders[giver], rank)
                if giver != rank:
                    sent[giver] += move.elements
                moves.append(move)
            covered = sum(map(volume, parts))
            if covered != volume(wanted.box):
                raise RunError(
                    f"resharding: {wanted.name} {wanted.box} of rank {rank} ({wanted.key}) needs "
                    f"{volume(wanted.box)} elements "
                    f"and the source layout supplies {covered}"
                )
    return Plan(tuple(moves))


def _check_same_tensors(source: WeightLayout, target: WeightLayout) -> None:
    for name in sorted(set(source.shapes) ^ set(target.shapes)):
        where = "source" if name in source.shapes else "target"
        raise RunError(f"resharding: tensor {name} exists only in the {where} layout: these are different models")
    for name, shape in source.shapes.items():
        if tuple(shape) != tuple(target.shapes[name]):
            raise RunError(
                f"resharding: {name} is {shape} in the source layout and {target.shapes[name]} in the target"
            )


def _boxes_by_name(layout: WeightLayout) -> Mapping[str, dict[Box, dict[int, Placement]]]:
    """name → box → rank → placement. A rank that holds a box twice (tied embeddings) gives its first."""
    boxes: dict[str, dict[Box, dict[int, Placement]]] = defaultdict(dict)
    for rank in sorted(layout.placements):
        for placement in layout.placements[rank]:
            boxes[placement.name].setdefault(placement.box, {}).setdefault(rank, placement)
    return boxes


def _move(wanted: Placement, common: Box, giver: int, given: Placement, rank: int) -> Move:
    return Move(
        name=wanted.name,
        shape=tuple(stop - start for start, stop in common),
        source_rank=giver,
        source_key=given.key,
        source_offset=_local_offset(given, common),
        target_rank=rank,
        target_key=wanted.key,
        target_offset=_local_offset(wanted, common),
    )


def _local_offset(placement: Placement, box: Box) -> tuple[int, ...]:
    return tuple(
        local + start - first
        for local, (start, _), (first, _) in zip(placement.offset, box, placement.box, strict=True)
    )
