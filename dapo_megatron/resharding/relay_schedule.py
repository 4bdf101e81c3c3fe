"""What crosses machines, in rounds: which learner rank sends which parcel to which, and who takes it from there.

A parcel goes from a learner rank to one on another machine, whose staging memory the machine's workers read. What
several workers of a machine want crosses once, unless it is small. The staging memory has two slots; round k uses slot
k mod 2.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from dapo_megatron.resharding.messages import COALESCE_BELOW, cut, in_rounds
from dapo_megatron.resharding.plan import Move, Plan
from dapo_megatron.resharding.topology import Topology

SLOTS = 2  # of staging memory: one is filled while the other is read
SHARES = SLOTS + 1  # of a bucket: the slots, and one to pack in what does not lie ready to be sent
PARCELS = 4  # a slot at least, so that several ranks can fill it at once

Piece = tuple[Move, ...]  # moves of one run of one rank into several workers of a machine


@dataclass(frozen=True, slots=True)
class Parcel:
    """Pieces that travel as one flat buffer from rank `giver` to rank `relay`, one behind the other.

    offset: where they lie in the slot of `relay` (elements).
    """

    giver: int
    relay: int
    pieces: tuple[Piece, ...]
    elements: int
    offset: int = 0

    @property
    def takers(self) -> set[int]:
        """The places of the workers that want a part of it."""
        return {move.target_rank for piece in self.pieces for move in piece}


Round = tuple[Parcel, ...]


def relay_rounds(
    plan: Plan,
    topology: Topology,
    *,
    itemsize: int,
    bucket_bytes: int,
    most_operations: int,
    small_bytes: int = COALESCE_BELOW,
) -> tuple[Round, ...]:
    """The plan's moves between machines, in rounds that all ranks share.

    In a round a rank receives at most a slot, sends at most a slot, and has at most `most_operations` sends and
    receives; a slot is a third of `bucket_bytes`. Runs are cut at a quarter of it, those below `small_bytes` share
    parcels, each to the home of one worker. The relay of a parcel is one of its takers' homes, the one that receives
    least so far. Only a single element may exceed a slot. `itemsize`: bytes an element on the wire.

    No deadlock: every rank posts all its sends and receives of round k at once, as soon as round k − 1 is done at this
    rank and the workers have taken round k − 2 out of its slot. A worker takes what any relay has, when it has it, so
    no relay waits for another through a worker. Let k be the first round that is not done everywhere. Rounds before it
    are done and can be taken, so every slot of round k becomes free, so every rank posts round k, both ends of each
    parcel, and it is done. Two ranks list the parcels between them in one order, so these match.
    """
    slot = slot_elements(bucket_bytes, itemsize)
    most = max(1, slot // PARCELS)
    received: dict[int, int] = defaultdict(int)
    pairs: dict[tuple[int, int], list[Parcel]] = defaultdict(list)
    for pieces in _contents(plan, topology, most, small_bytes // itemsize):
        elements = sum(piece[0].elements for piece in pieces)
        homes = {topology.home(move.target_rank) for piece in pieces for move in piece}
        relay = min(homes, key=lambda rank: (received[rank], rank))
        received[relay] += elements
        giver = pieces[0][0].source_rank
        pairs[giver, relay].append(Parcel(giver, relay, pieces, elements))
    return _fitted(in_rounds(pairs), slot, most_operations)


def slot_elements(bucket_bytes: int, itemsize: int) -> int:
    """The most elements that a rank receives in a round."""
    return max(1, bucket_bytes // SHARES // itemsize)


def _contents(plan: Plan, topology: Topology, most: int, small: int) -> Iterator[tuple[Piece, ...]]:
    """The pieces of each parcel: a run of its own, in parts, or several that are small."""
    wanted: dict[tuple[object, ...], list[Move]] = defaultdict(list)
    for move in plan.moves:
        machine, home = topology.machine(move.target_rank), topology.home(move.target_rank)
        if topology.machine(move.source_rank) != machine:
            # for what is small no worker opens memory on another device, which takes some of that device's
            where = (True, home) if move.elements < min(small, most) else (False, machine)
            wanted[move.source_rank, where, move.source_key, move.source_offset, move.shape].append(move)
    waiting: dict[tuple[int, int], list[Piece]] = defaultdict(list)  # small ones, by giver and home
    load: dict[tuple[int, int], int] = defaultdict(int)
    for moves in wanted.values():
        first = moves[0]
        if first.elements >= min(small, most):
            yield from ((piece,) for piece in zip(*(cut(move, most) for move in moves), strict=True))
            continue
        pair = (first.source_rank, topology.home(first.target_rank))
        if load[pair] + first.elements > most:
            yield tuple(waiting.pop(pair))
            load[pair] = 0
        waiting[pair].append(tuple(moves))
        load[pair] += first.elements
    yield from (tuple(pieces) for pieces in waiting.values())


def _fitted(parcels: Iterator[Parcel], slot: int, most_operations: int) -> tuple[Round, ...]:
    """Each parcel in the first round in which both its ranks have room for it."""
    rounds: list[list[Parcel]] = []
    sent: dict[int, list[int]] = defaultdict(list)  # by rank, in each round so far
    received: dict[int, list[int]] = defaultdict(list)
    operations: dict[int, list[int]] = defaultdict(list)
    first: dict[tuple[str, int], int] = defaultdict(int)  # rounds of a rank before it are full, or nearly
    for parcel in parcels:
        giver, relay, size = parcel.giver, parcel.relay, parcel.elements
        given, taken = sent[giver], received[relay]
        own, other = operations[giver], operations[relay]
        k = max(first["send", giver], first["receive", relay])
        while True:
            for counts in (given, taken, own, other):
                counts.extend([0] * (k + 1 - len(counts)))
            room = (not given[k] or given[k] + size <= slot) and (not taken[k] or taken[k] + size <= slot)
            if room and own[k] < most_operations and other[k] < most_operations:
                break
            k += 1
        rounds.extend([] for _ in range(k + 1 - len(rounds)))
        rounds[k].append(Parcel(giver, relay, parcel.pieces, size, taken[k]))
        given[k] += size
        taken[k] += size
        own[k] += 1
        other[k] += 1
        for side, rank, counts in (("send", giver, given), ("receive", relay, taken)):
            while first[side, rank] < len(counts) and counts[first[side, rank]] * 16 > slot * 15:
                first[side, rank] += 1
    return tuple(map(tuple, rounds))
