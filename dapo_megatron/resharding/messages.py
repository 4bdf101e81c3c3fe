"""What travels between processes: a plan's moves as messages in one global order, and each rank's windows of them.

A run that is one piece of memory at both ends goes from storage to storage. Everything else passes through a bucket.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from dapo_megatron.resharding.plan import Move, Plan

MOST_DIRECT_BYTES = 1 << 30  # transports count bytes in 32 bits
COALESCE_BELOW = 1 << 16  # bytes: smaller runs share messages
Sent = TypeVar("Sent")


@dataclass(frozen=True, slots=True)
class Message:
    """Moves from one rank to another that travel as one flat buffer, one behind the other.

    `direct`: a single contiguous run, from storage to storage; needs no bucket.
    """

    source_rank: int
    target_rank: int
    moves: tuple[Move, ...]
    elements: int
    direct: bool


def messages_of(
    plan: Plan, *, itemsize: int, bucket_bytes: int, coalesce_below: int = COALESCE_BELOW
) -> tuple[Message, ...]:
    """The plan's moves between different processes as messages, in one order that all ranks share.

    Contiguous runs of at least `coalesce_below` bytes are direct, cut at 1 GiB. Other runs are cut at half a bucket,
    along dimension 0 first; those below `coalesce_below` bytes share messages of at most half a bucket with others of
    their pair. Only a single element may be larger than half a bucket. `itemsize`: bytes an element on the wire.

    Order: round j holds the j-th message of every pair. Within a round the pairs come in shifts: the i-th sender with
    the (i + d)-th receiver for d = 0, 1, …, so that no rank appears twice on one side of a shift and all are busy.
    """
    half = max(1, bucket_bytes // 2 // itemsize)
    pairs: dict[tuple[int, int], list[Message]] = {}
    small: dict[tuple[int, int], list[Move]] = {}
    small_load: dict[tuple[int, int], int] = {}
    for move in plan.moves:
        pair = (move.source_rank, move.target_rank)
        if pair[0] == pair[1]:
            continue
        elements = move.elements
        done = pairs.setdefault(pair, [])
        if elements * itemsize >= coalesce_below or elements > half:
            direct = move.contiguous and elements * itemsize >= coalesce_below
            most = max(1, MOST_DIRECT_BYTES // itemsize) if direct else half
            done += (Message(*pair, (part,), part.elements, direct) for part in cut(move, most))
        else:
            waiting, load = small.setdefault(pair, []), small_load.get(pair, 0)
            if load + elements > half:
                done.append(Message(*pair, tuple(waiting), load, False))
                waiting = small[pair] = []
                load = 0
            waiting.append(move)
            small_load[pair] = load + elements
    for pair, waiting in small.items():
        pairs[pair].append(Message(*pair, tuple(waiting), small_load[pair], False))
    return tuple(in_rounds(pairs))


def windows_of(
    messages: Iterable[Message], rank: int, *, itemsize: int, bucket_bytes: int, most_operations: int
) -> list[list[Message]]:
    """The messages that `rank` sends or receives, in windows: it posts all of a window, waits for all, goes on.

    In a window the bytes that need a bucket, sent and received together, stay within `bucket_bytes` (a larger message
    is the only one of its window that needs it) and there are at most `most_operations` messages. Ranks cut their
    windows independently.

    No deadlock: let m be the first unfinished message of the global order. Each of its two ranks has finished all its
    messages before m, thus all its windows before the one with m, and has posted that whole window, m included. Both
    ends are posted, so m finishes. The messages of a pair are posted in one order at both ends, so they match.
    """
    windows: list[list[Message]] = []
    load = 0
    for message in messages:
        if rank not in (message.source_rank, message.target_rank):
            continue
        size = 0 if message.direct else message.elements * itemsize
        if not windows or len(windows[-1]) >= most_operations or (load and load + size > bucket_bytes and size):
            windows.append([])
            load = 0
        windows[-1].append(message)
        load += size
    return windows


def cut(move: Move, most_elements: int) -> Iterator[Move]:
    """The move in parts of at most `most_elements`: by rows, and a row that is too large by its own rows."""
    if move.elements <= most_elements:
        yield move
        return
    for start, shape in _parts(move.shape, most_elements):
        yield Move(
            move.name,
            shape,
            move.source_rank,
            move.source_key,
            tuple(a + b for a, b in zip(move.source_offset, start, strict=True)),
            move.target_rank,
            move.target_key,
            tuple(a + b for a, b in zip(move.target_offset, start, strict=True)),
            move.contiguous,
        )


@lru_cache(maxsize=256)
def _parts(shape: tuple[int, ...], most_elements: int) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """`_boxes`, once for all layers and ranks."""
    return tuple(_boxes(shape, most_elements))


def _boxes(shape: tuple[int, ...], most_elements: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(start, shape) of the parts of a box, in memory order."""
    rows, inner = shape[0], 1
    for size in shape[1:]:
        inner *= size
    if inner <= most_elements:
        step = most_elements // inner
        for row in range(0, rows, step):
            yield (row, *(0 for _ in shape[1:])), (min(step, rows - row), *shape[1:])
        return
    for row in range(rows):
        for start, part in _boxes(shape[1:], most_elements):
            yield (row, *start), (1, *part)


def in_rounds(pairs: Mapping[tuple[int, int], Sequence[Sent]]) -> Iterator[Sent]:
    """What each (giver, taker) has, in the order that `messages_of` tells."""
    givers = {rank: i for i, rank in enumerate(sorted({giver for giver, _ in pairs}))}
    takers = {rank: i for i, rank in enumerate(sorted({taker for _, taker in pairs}))}
    shifts = max(len(givers), len(takers), 1)
    in_shifts = sorted(pairs, key=lambda pair: ((takers[pair[1]] - givers[pair[0]]) % shifts, pair))
    turn, waiting = 0, [pairs[pair] for pair in in_shifts]
    while waiting:
        yield from (messages[turn] for messages in waiting)
        turn += 1
        waiting = [messages for messages in waiting if len(messages) > turn]
