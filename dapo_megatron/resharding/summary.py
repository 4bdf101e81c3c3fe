"""What carrying out a plan costs, in numbers: bytes, messages, and the time the links need for them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dapo_megatron.resharding.messages import Message
from dapo_megatron.resharding.plan import Plan


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


def _spread(by_rank: dict[int, int]) -> Spread:
    sizes = by_rank.values()
    return Spread(min(sizes), sum(sizes) / len(sizes), max(sizes))
