"""What crosses machines, in rounds: which learner rank sends which parcel to which, and who takes it from there.

A parcel goes from a learner rank to one on another machine, whose staging memory the machine's workers read. What
several workers of a machine want crosses once, unless it is small. The staging memory has two slots; round k uses slot
k mod 2.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dapo_megatron.resharding.messages import COALESCE_BELOW, cut, in_rounds
from dapo_megatron.resharding.plan import Move, Plan, without_collector
from dapo_megatron.resharding.topology import Topology

SLOTS = 2  # of staging memory: one is filled while the other is read
SHARES = SLOTS + 1  # of a bucket: the slots, and one to pack in what does not lie ready to be sent
PARCELS = 4  # a slot at least, so that several ranks can fill it at once

Piece = tuple[Move, ...]  # moves of one run of one rank into several workers of a machine

Content = tuple[int, int, tuple[Piece, ...], int]  # giver, relay, pieces, elements: a parcel without its place


@dataclass(frozen=True, slots=True)
class Parcel:
    """Pieces that travel as one flat buffer from rank `giver` to rank `relay`, one behind the other.

    offset: where they lie in the slot of `relay` (elements).
    """

    giver: int
    relay: int
    pieces: tuple[Piece, ...]
    elements: int
    offset: int

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
    pairs: dict[tuple[int, int], list[Content]] = defaultdict(list)
    with without_collector():
        for homes, pieces in _contents(plan, topology, most, small_bytes // itemsize):
            elements = sum(piece[0].elements for piece in pieces)
            relay = homes[0] if len(homes) == 1 else min(homes, key=lambda rank: (received[rank], rank))
            received[relay] += elements
            giver = pieces[0][0].source_rank
            pairs[giver, relay].append((giver, relay, pieces, elements))
        return fitted(in_rounds(pairs), slot, most_operations)


def slot_elements(bucket_bytes: int, itemsize: int) -> int:
    """The most elements that a rank receives in a round."""
    return max(1, bucket_bytes // SHARES // itemsize)


def _contents(
    plan: Plan, topology: Topology, most: int, small: int
) -> Iterator[tuple[Sequence[int], tuple[Piece, ...]]]:
    """The homes of who wants them, and the pieces of each parcel: a run of its own, in parts, or several that are
    small."""
    machines, home_of = topology.machines, [*range(len(topology.machines)), *topology.homes]
    wanted: dict[tuple[object, ...], list[Move]] = defaultdict(list)
    for move in plan.moves:
        home = home_of[move.target_rank]
        machine = machines[home]
        if machines[home_of[move.source_rank]] != machine:
            # for what is small no worker opens memory on another device, which takes some of that device's
            where = (True, home) if move.elements < min(small, most) else (False, machine)
            wanted[move.source_rank, where, move.source_key, move.source_offset, move.shape].append(move)
    waiting: dict[tuple[int, int], list[Piece]] = defaultdict(list)  # small ones, by giver and home
    load: dict[tuple[int, int], int] = defaultdict(int)
    for moves in wanted.values():
        first = moves[0]
        if first.elements >= min(small, most):
            homes = sorted({home_of[move.target_rank] for move in moves})
            yield from ((homes, (piece,)) for piece in zip(*(cut(move, most) for move in moves), strict=True))
            continue
        pair = (first.source_rank, home_of[first.target_rank])
        if load[pair] + first.elements > most:
            yield [pair[1]], tuple(waiting.pop(pair))
            load[pair] = 0
        waiting[pair].append(tuple(moves))
        load[pair] += first.elements
    yield from (([home], tuple(pieces)) for (_, home), pieces in waiting.items())


class _Side:
    """What a rank sends, or receives, round by round.

    load: elements. operations: of both sides of the rank. full: every round before it is full, or nearly. later: for a
    size, from each round the first from which on there may be room for it: room never grows, so what was passed over
    once is passed over for ever.
    """

    __slots__ = ("full", "later", "load", "operations")

    def __init__(self, operations: list[int]) -> None:
        self.load: list[int] = []
        self.operations, self.full = operations, 0
        self.later: dict[int, list[int]] = {}

    def next_room(self, k: int, size: int, slot: int, most_operations: int) -> int:
        """The first round from k on with room for `size` elements and an operation more."""
        load, operations, later = self.load, self.operations, self.later.get(size)
        if later is None:
            later = self.later[size] = list(range(len(load)))
        most = max(0, slot - size)  # beside it; nothing where it is larger than a slot
        while True:
            try:
                while (after := later[k]) != k:
                    later[k] = k = later[after]
                while operations[k] >= most_operations or load[k] > most:
                    later[k] = k + 1
                    k += 1
                    if later[k] != k:
                        break
                else:
                    return k
            except IndexError:
                self._lengthen()

    def add(self, k: int, size: int, slot: int) -> int:
        """Put `size` elements into round k; returns how many were there."""
        load = self.load
        before = load[k]
        load[k] += size
        self.operations[k] += 1
        while load[self.full] * 16 > slot * 15:
            self.full += 1
            if self.full == len(load):
                self._lengthen()
        return before

    def _lengthen(self) -> None:
        rounds = 2 * len(self.load) + 64
        for counts in (self.load, self.operations):
            counts.extend([0] * (rounds - len(counts)))
        for later in self.later.values():
            later.extend(range(len(later), rounds))


def fitted(contents: Iterable[Content], slot: int, most_operations: int) -> tuple[Round, ...]:
    """Each parcel in the first round in which both its ranks have room for it; rounds at a rank's beginning that are
    15 / 16 full are not looked at again. `slot`: elements."""
    rounds: list[list[Parcel]] = []
    operations: dict[int, list[int]] = defaultdict(list)  # by rank, in each round
    givers: dict[int, _Side] = {}
    relays: dict[int, _Side] = {}
    for giver, relay, pieces, size in contents:
        given, taken = givers.get(giver), relays.get(relay)
        if given is None:
            given = givers[giver] = _Side(operations[giver])
        if taken is None:
            taken = relays[relay] = _Side(operations[relay])
        k, other = -1, max(given.full, taken.full)
        while k != other:
            k = given.next_room(other, size, slot, most_operations)
            other = taken.next_room(k, size, slot, most_operations)
        while len(rounds) <= k:
            rounds.append([])
        given.add(k, size, slot)
        offset = taken.add(k, size, slot)
        rounds[k].append(Parcel(giver, relay, pieces, size, offset))
    return tuple(map(tuple, rounds))
