"""The fewest elements that must change process between two layouts, counted without making a plan.

For each destination process: what it wants less what a source shard in the same process holds. Padding is in no
placement, so it counts nowhere.
"""

from collections.abc import Iterable, Sequence

from dapo_megatron.resharding.layout import Box, Placement, WeightLayout, intersect, volume
from dapo_megatron.resharding.topology import Topology


def minimum_elements(source: WeightLayout, target: WeightLayout) -> dict[int, int]:
    """Destination rank → elements that it cannot find in its own process."""
    known: dict[tuple[int, int], int] = {}  # ranks that share placements share the count
    found = {}
    for rank, wanted in target.placements.items():
        held = source.placements.get(rank, ())
        key = (id(wanted), id(held))
        if key not in known:
            known[key] = _missing(wanted, held)
        found[rank] = known[key]
    return found


def minimum_crossing(source: WeightLayout, target: WeightLayout, topology: Topology) -> dict[int, int]:
    """Machine → elements that its workers want, each once, and that none of its learner ranks holds."""
    wanted, held = ({machine: {} for machine in sorted(set(topology.machines))} for _ in range(2))
    for layout, found in ((target, wanted), (source, held)):
        for rank, placements in layout.placements.items():
            found[topology.machine(rank)].setdefault(id(placements), placements)
    known: dict[tuple[frozenset[int], frozenset[int]], int] = {}  # machines alike share the count
    counts = {}
    for machine, lists in wanted.items():
        key = frozenset(lists), frozenset(held[machine])
        if key not in known:
            distinct = {(p.name, p.box): p for placements in lists.values() for p in placements}
            known[key] = _missing(tuple(distinct.values()), [p for some in held[machine].values() for p in some])
        counts[machine] = known[key]
    return counts


def _missing(wanted: Sequence[Placement], held: Sequence[Placement]) -> int:
    held_boxes: dict[str, list[Box]] = {}
    for placement in held:
        held_boxes.setdefault(placement.name, []).append(placement.box)
    return sum(_volume_outside(placement.box, held_boxes.get(placement.name, ())) for placement in wanted)


def _volume_outside(box: Box, held: Iterable[Box]) -> int:
    remaining = [box]
    for other in held:
        remaining = [part for rest in remaining for part in _subtract(rest, other)]
    return sum(map(volume, remaining))


def _subtract(box: Box, other: Box) -> list[Box]:
    """`box` without `other`, as disjoint boxes: slabs below and above the common part, a dimension at a time."""
    common = intersect(box, other)
    if common is None:
        return [box]
    slabs = []
    for d, ((start, stop), (low, high)) in enumerate(zip(box, common, strict=True)):
        slabs += [(*common[:d], edge, *box[d + 1 :]) for edge in ((start, low), (high, stop)) if edge[0] < edge[1]]
    return slabs
