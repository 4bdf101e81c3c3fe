"""What carrying out a plan costs, in numbers: bytes, messages, what crosses machines, and the seconds of links."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dapo_megatron.resharding.messages import Message
from dapo_megatron.resharding.plan import Plan
from dapo_megatron.resharding.relay_schedule import Round
from dapo_megatron.resharding.topology import Topology


@dataclass(frozen=True)
class Spread:
    """Bytes a rank."""

    least: int
    mean: float
    most: int


@dataclass(frozen=True)
class PlanSummary:
    """Bytes between processes are counted in the dtype of the destination.

    packed_bytes: of runs that are strided at an end and pass through a bucket; coalesced_bytes: of small contiguous
    runs that share a message. Sent and received are of the ranks that hold sources or destinations, idle ones included.
    """

    bytes_total: int  # that change process
    bytes_minimum: int  # that cannot be avoided
    bytes_copied: int  # inside a process
    bytes_per_destination_rank: tuple[int, ...]  # received, in the order of destination_ranks
    destination_ranks: tuple[int, ...]
    sent: Spread  # a source rank
    received: Spread  # a destination rank
    messages: int
    direct_messages: int  # from storage to storage
    packed_bytes: int
    coalesced_bytes: int
    busiest_link_bytes: int  # the most that one rank sends, or receives

    @property
    def ratio(self) -> float:
        """bytes_total / bytes_minimum; 1 where nothing must travel and nothing does."""
        if self.bytes_minimum == 0:
            return 1.0 if self.bytes_total == 0 else float("inf")
        return self.bytes_total / self.bytes_minimum

    def seconds_at(self, link_gbps: float) -> float:
        """Lower bound: every rank sends and receives at once, `link_gbps` (10⁹ bit/s) each way; packing not counted."""
        return self.busiest_link_bytes * 8 / (link_gbps * 1e9)


def summarise(
    plan: Plan,
    messages: Sequence[Message],
    *,
    source_ranks: Iterable[int],
    destination_ranks: Iterable[int],
    minimum_elements: int,
    itemsize: int,
) -> PlanSummary:
    """Count a plan and its messages. `minimum_elements`: of all destination ranks (`minimum.minimum_elements`)."""
    sent, received = dict.fromkeys(source_ranks, 0), dict.fromkeys(destination_ranks, 0)
    copied = sum(m.elements for m in plan.moves if m.source_rank == m.target_rank)
    packed = coalesced = 0
    for message in messages:
        size = message.elements * itemsize
        sent[message.source_rank] += size
        received[message.target_rank] += size
        if not message.direct:
            strided = sum(move.elements for move in message.moves if not move.contiguous) * itemsize
            packed, coalesced = packed + strided, coalesced + size - strided
    return PlanSummary(
        bytes_total=sum(received.values()),
        bytes_minimum=minimum_elements * itemsize,
        bytes_copied=copied * itemsize,
        bytes_per_destination_rank=tuple(received.values()),
        destination_ranks=tuple(received),
        sent=_spread(sent),
        received=_spread(received),
        messages=len(messages),
        direct_messages=sum(message.direct for message in messages),
        packed_bytes=packed,
        coalesced_bytes=coalesced,
        busiest_link_bytes=max(*sent.values(), *received.values()),
    )


@dataclass(frozen=True)
class CrossingSummary:
    """What a transfer to engines beside the learner carries between machines, and inside them; learner ranks alone
    send and receive between machines.

    bytes_on_devices: copied on a worker's own device; bytes_beside: out of the memory of other devices of the machine,
    what came from elsewhere included.
    """

    machines: int
    bytes_crossing: int
    bytes_minimum: int  # that cannot be avoided: once a machine
    bytes_on_devices: int
    bytes_beside: int
    sent: Spread  # a learner rank
    received: Spread
    parcels: int
    rounds: int
    busiest_rank_bytes: int  # the most that one rank sends, or receives, between machines

    def seconds_at(self, link_gbps: float) -> float:
        """Lower bound: every rank sends and receives at once, `link_gbps` (10⁹ bit/s) each way."""
        return self.busiest_rank_bytes * 8 / (link_gbps * 1e9)


def summarise_crossing(
    plan: Plan, rounds: Sequence[Round], topology: Topology, *, minimum_elements: int, itemsize: int
) -> CrossingSummary:
    """Count what crosses. `minimum_elements`: of all machines (`minimum.minimum_crossing`)."""
    sent, received = (dict.fromkeys(range(len(topology.machines)), 0) for _ in range(2))
    on_devices = beside = 0
    for move in plan.moves:
        if move.source_rank == topology.home(move.target_rank):
            on_devices += move.elements * itemsize
        elif topology.machine(move.source_rank) == topology.machine(move.target_rank):
            beside += move.elements * itemsize
    for parcel in (parcel for parcels in rounds for parcel in parcels):
        size = parcel.elements * itemsize
        sent[parcel.giver] += size
        received[parcel.relay] += size
        for move in (move for piece in parcel.pieces for move in piece):
            if topology.home(move.target_rank) == parcel.relay:
                on_devices += move.elements * itemsize
            else:
                beside += move.elements * itemsize
    return CrossingSummary(
        machines=len(set(topology.machines)),
        bytes_crossing=sum(received.values()),
        bytes_minimum=minimum_elements * itemsize,
        bytes_on_devices=on_devices,
        bytes_beside=beside,
        sent=_spread(sent),
        received=_spread(received),
        parcels=sum(map(len, rounds)),
        rounds=len(rounds),
        busiest_rank_bytes=max(*sent.values(), *received.values()),
    )


def _spread(by_rank: dict[int, int]) -> Spread:
    sizes = by_rank.values()
    return Spread(min(sizes), sum(sizes) / len(sizes), max(sizes))
