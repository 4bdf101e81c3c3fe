"""The moves that turn one layout into another: every destination element from exactly one source.

Ranks with equal placements form a group (data-parallel replicas, engines). Boxes are intersected once for each group of
targets; neighbouring boxes that are neighbours at both ends become one run; after that only senders are chosen.
"""

import gc
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

from dapo_megatron.errors import RunError
from dapo_megatron.resharding.layout import Box, Placement, WeightLayout, intersect, volume
from dapo_megatron.resharding.topology import Topology

SHARED_CHOICE = 1 << 18  # elements of small runs for one target that share a sender, so that they can share messages


@dataclass(frozen=True, slots=True)
class Move:
    """One run: `shape` elements from (source rank, key, offset) to (target rank, key, offset).

    `name`: the canonical tensor; of a merged run all its tensors, joined by " + ".
    `contiguous`: the run is one piece of memory in both local tensors (which are contiguous themselves).
    """

    name: str
    shape: tuple[int, ...]
    source_rank: int
    source_key: str
    source_offset: tuple[int, ...]
    target_rank: int
    target_key: str
    target_offset: tuple[int, ...]
    contiguous: bool

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Plan:
    """All moves, in one order that every rank shares."""

    moves: tuple[Move, ...]

    @cached_property
    def elements_moved(self) -> int:
        """Elements that change process."""
        return sum(move.elements for move in self.moves if move.source_rank != move.target_rank)


# (placements, the ranks that hold exactly these), by first rank
Groups = tuple[tuple[tuple[Placement, ...], tuple[int, ...]], ...]


@dataclass(slots=True)
class _Run:
    """A run into one group of targets: `sources` has, by group of sources, key, offset and contiguity at both ends."""

    names: list[str]
    shape: tuple[int, ...]
    key: str
    offset: tuple[int, ...]
    sources: dict[int, tuple[str, tuple[int, ...], bool]]
    holders: tuple[int, ...] = ()  # the groups of `sources`
    elements: int = 0


def make_plan(source: WeightLayout, target: WeightLayout, topology: Topology | None = None) -> Plan:
    """Intersect two layouts over the same ranks of one world (rank i of both is one process).

    A run that lies in the destination's own process is taken from there; other runs come from the replica that has sent
    least so far. With `topology` replicas on the destination's device come first, then those on its machine, and what
    no learner rank of a machine holds comes for all its workers from one and the same rank.

    Raises:
        RunError: a tensor of one side unknown to the other, shapes that differ, a destination element with no source or
            two, two slices that want the same place of a local tensor.
    """
    _check_same_tensors(source, target)
    return _plan(_groups(source), _groups(target), topology)


def _groups(layout: WeightLayout) -> Groups:
    """Ranks with equal placements, together."""
    by_identity: dict[int, tuple[tuple[Placement, ...], list[int]]] = {}  # hashing a tuple for each rank would be slow
    for rank in sorted(layout.placements):
        placements = layout.placements[rank]
        by_identity.setdefault(id(placements), (placements, []))[1].append(rank)
    found: dict[tuple[Placement, ...], list[int]] = {}
    for placements, ranks in by_identity.values():
        found.setdefault(placements, []).extend(ranks)
    return tuple((placements, tuple(sorted(ranks))) for placements, ranks in found.items())


@contextmanager
def without_collector() -> Iterator[None]:
    """Inside, no garbage is looked for: plans are a million small values without a cycle among them, and looking at all
    of them again and again would take half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@without_collector()
def _plan(source: Groups, target: Groups, topology: Topology | None) -> Plan:
    boxes = _boxes_by_name(source)
    extents = [local_extents(placements) for placements, _ in source]
    runs_of: dict[int, list[_Run]] = {}
    for placements, ranks in target:
        _check_no_overlap(placements, ranks[0])
        into = local_extents(placements)
        runs = list(_merged(_pieces(placements, ranks[0], boxes)))
        for run in runs:
            _complete(run, extents, into)
        runs_of.update(dict.fromkeys(ranks, runs))
    return Plan(tuple(_choose_senders(runs_of, [ranks for _, ranks in source], topology)))


def _check_same_tensors(source: WeightLayout, target: WeightLayout) -> None:
    for name in sorted(set(source.shapes) ^ set(target.shapes)):
        where = "source" if name in source.shapes else "target"
        raise RunError(f"resharding: tensor {name} exists only in the {where} layout: these are different models")
    for name, shape in source.shapes.items():
        if tuple(shape) != tuple(target.shapes[name]):
            raise RunError(
                f"resharding: {name} is {shape} in the source layout and {target.shapes[name]} in the target"
            )


def _check_no_overlap(placements: Sequence[Placement], rank: int) -> None:
    by_key: dict[str, list[Placement]] = defaultdict(list)
    for placement in placements:
        by_key[placement.key].append(placement)
    for key, inside in by_key.items():
        for one, other in combinations(inside, 2):
            if intersect(_local_box(one), _local_box(other)) is not None:
                raise RunError(
                    f"resharding: {one.name} {one.box} and {other.name} {other.box} want the same place of {key} on "
                    f"rank {rank}"
                )


def _local_box(placement: Placement) -> Box:
    return tuple((start, start + size) for start, size in zip(placement.offset, placement.shape, strict=True))


def _boxes_by_name(source: Groups) -> dict[str, dict[Box, dict[int, Placement]]]:
    """name → box → group → placement. A rank that holds a box twice (tied embeddings) gives its first."""
    boxes: dict[str, dict[Box, dict[int, Placement]]] = defaultdict(dict)
    for group, (placements, _) in enumerate(source):
        for placement in placements:
            if volume(placement.box):
                boxes[placement.name].setdefault(placement.box, {}).setdefault(group, placement)
    return boxes


def _pieces(
    placements: Sequence[Placement], rank: int, boxes: dict[str, dict[Box, dict[int, Placement]]]
) -> Iterator[_Run]:
    """The intersections that fill one group's placements, checked to cover each of them exactly once."""
    for wanted in placements:
        parts: list[Box] = []
        for box, holders in boxes[wanted.name].items():
            common = intersect(box, wanted.box)
            if common is None:
                continue
            # counted elements alone would let an overlap make up for a hole
            if any(intersect(common, other) is not None for other in parts):
                raise RunError(
                    f"resharding: {wanted.name} {common} of rank {rank} ({wanted.key}) has two different sources: "
                    "slices of the source layout overlap"
                )
            parts.append(common)
            yield _Run(
                [wanted.name],
                tuple(stop - start for start, stop in common),
                wanted.key,
                _local_offset(wanted, common),
                {group: (given.key, _local_offset(given, common), False) for group, given in holders.items()},
            )
        covered = sum(map(volume, parts))
        if covered != volume(wanted.box):
            raise RunError(
                f"resharding: {wanted.name} {wanted.box} of rank {rank} ({wanted.key}) needs "
                f"{volume(wanted.box)} elements and the source layout supplies {covered}"
            )


def _local_offset(placement: Placement, box: Box) -> tuple[int, ...]:
    return tuple(
        local + start - first
        for local, (start, _), (first, _) in zip(placement.offset, box, placement.box, strict=True)
    )


def _merged(pieces: Iterable[_Run]) -> Iterator[_Run]:
    """Pieces that follow each other along dimension 0 in the target and in all their sources become one run."""
    by_key: dict[str, list[_Run]] = {}
    for piece in pieces:
        by_key.setdefault(piece.key, []).append(piece)
    for inside in by_key.values():
        run = None
        # by column block first, so that row neighbours are list neighbours
        for piece in sorted(inside, key=lambda p: (p.offset[1:], p.offset[0])):
            if run is not None and _continues(run, piece):
                if piece.names[0] not in run.names:
                    run.names += piece.names
                run.shape = (run.shape[0] + piece.shape[0], *run.shape[1:])
                continue
            if run is not None:
                yield run
            run = piece
        if run is not None:
            yield run


def _continues(run: _Run, piece: _Run) -> bool:
    rows = run.shape[0]
    return (
        run.shape[1:] == piece.shape[1:]
        and _follows(run.offset, piece.offset, rows)
        and run.sources.keys() == piece.sources.keys()
        and all(
            key == piece.sources[group][0] and _follows(offset, piece.sources[group][1], rows)
            for group, (key, offset, _) in run.sources.items()
        )
    )


def _follows(offset: tuple[int, ...], after: tuple[int, ...], rows: int) -> bool:
    return offset[0] + rows == after[0] and offset[1:] == after[1:]


def local_extents(placements: Iterable[Placement]) -> dict[str, tuple[int, ...]]:
    """Key → the extent of the local tensor that placements reach. Padding adds rows alone, so all dimensions but the
    first are the tensor's own."""
    extents: dict[str, tuple[int, ...]] = {}
    for placement in placements:
        ends = tuple(start + size for start, size in zip(placement.offset, placement.shape, strict=True))
        known = extents.get(placement.key)
        extents[placement.key] = ends if known is None else tuple(map(max, known, ends))
    return extents


def _complete(run: _Run, source: Sequence[dict[str, tuple[int, ...]]], target: dict[str, tuple[int, ...]]) -> None:
    """What follows from a run that is merged, once for all its moves."""
    run.names = [" + ".join(run.names)]
    run.holders, run.elements = tuple(run.sources), math.prod(run.shape)
    into = is_contiguous(run.shape, target[run.key])
    for group, (key, offset, _) in run.sources.items():
        run.sources[group] = (key, offset, into and is_contiguous(run.shape, source[group][key]))


def is_contiguous(shape: tuple[int, ...], extents: tuple[int, ...]) -> bool:
    """Whether a box of `shape` is one piece of a contiguous tensor of `extents`: behind the first dimension in which it
    is longer than 1 it spans the tensor."""
    leading = next((d for d, size in enumerate(shape) if size > 1), len(shape))
    return shape[leading + 1 :] == extents[leading + 1 :]


# who may give a run to a place: (rank, group of sources), and whether all of them stand on other machines
Givers = tuple[list[tuple[int, int]], bool]


def _choose_senders(
    runs_of: dict[int, list[_Run]], source_ranks: list[tuple[int, ...]], topology: Topology | None
) -> Iterator[Move]:
    """Balanced by elements: runs that many ranks hold (norms) come last and even out what the others leave.

    Small runs for one target that have the same holders are chosen for together. What crosses machines is balanced
    apart from what does not, and counts once a machine.
    """
    sent: dict[tuple[int, bool], int] = defaultdict(int)  # by rank and whether to another machine
    crossing: dict[tuple[object, ...], tuple[int, int]] = {}  # machine and run → giver, its group
    group_with = {rank: group for group, ranks in enumerate(source_ranks) for rank in ranks}
    givers = _givers(runs_of, source_ranks, topology)
    for choice in sorted({len(found) for found, _ in givers.values()}):
        for rank in sorted(runs_of):
            own = group_with.get(rank)
            home = _home(rank, topology)
            shared: dict[tuple[int, ...], tuple[int, int, int]] = {}  # holders → giver, its group, elements so far
            for run in runs_of[rank]:
                holders, elements = run.holders, run.elements
                choices, far = givers[holders, home]
                if len(choices) != choice:
                    continue
                if own is not None and own in run.sources:
                    yield _move(run, rank, own, rank)
                    continue
                crosses = (topology.machine(rank), holders, run.shape, run.sources[holders[0]][:2]) if far else ()
                if crosses in crossing:
                    yield _move(run, *crossing[crosses], rank)
                    continue
                giver, group, load = shared.get(holders, (-1, -1, SHARED_CHOICE))
                if load + elements > SHARED_CHOICE:
                    _, giver, group = min((sent[r, far], r, g) for r, g in choices)
                    load = 0
                if elements <= SHARED_CHOICE:
                    shared[holders] = (giver, group, load + elements)
                if far:
                    crossing[crosses] = (giver, group)
                sent[giver, far] += elements
                yield _move(run, giver, group, rank)


def _givers(
    runs_of: dict[int, list[_Run]], source_ranks: list[tuple[int, ...]], topology: Topology | None
) -> dict[tuple[tuple[int, ...], int | None], Givers]:
    """By the holders of a run and the home of who wants it."""
    homes: dict[int, set[int | None]] = defaultdict(set)  # of the ranks that want a list of runs
    for rank, runs in runs_of.items():
        homes[id(runs)].add(_home(rank, topology))
    found: dict[tuple[tuple[int, ...], int | None], Givers] = {}
    for runs in {id(runs): runs for runs in runs_of.values()}.values():
        for holders in {run.holders for run in runs}:
            everybody = [(rank, group) for group in holders for rank in source_ranks[group]]
            for home in homes[id(runs)]:
                if (holders, home) not in found:
                    found[holders, home] = _nearest(everybody, home, topology)
    return found


def _nearest(everybody: list[tuple[int, int]], home: int | None, topology: Topology | None) -> Givers:
    if topology is None:
        return everybody, False
    beside = [giver for giver in everybody if giver[0] == home]
    near = beside or [giver for giver in everybody if topology.machine(giver[0]) == topology.machines[home]]
    return near or everybody, not near


def _home(rank: int, topology: Topology | None) -> int | None:
    return None if topology is None else topology.home(rank)


def _move(run: _Run, giver: int, group: int, rank: int) -> Move:
    key, offset, contiguous = run.sources[group]
    return Move(run.names[0], run.shape, giver, key, offset, rank, run.key, run.offset, contiguous)
