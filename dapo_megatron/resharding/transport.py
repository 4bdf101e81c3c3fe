"""Carries out a plan: copies inside a process, point-to-point messages between processes, in windows of bounded size.

A run that lies ready (one piece, in the wire's dtype) is sent from, or received into, its own storage. All else passes
through one bucket, allocated once. Nothing is gathered or broadcast.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_megatron.errors import RunError
from dapo_megatron.resharding.links import GroupLink, Link, Operation, await_all
from dapo_megatron.resharding.messages import Message, cut, messages_of, windows_of
from dapo_megatron.resharding.plan import Move, Plan
from dapo_megatron.resharding.precision import check_range_kept


@dataclass(frozen=True)
class Transfer:
    """What one place did. Bytes are counted as they are posted or copied, in the dtype in which they travel.

    `bytes_copied`: from the memory of this process; `bytes_packed`: of those sent or received, the part that went
    through the bucket.
    """

    bytes_sent: int
    bytes_received: int
    messages_sent: int
    messages_received: int
    bytes_copied: int
    bytes_packed: int
    seconds: float


@dataclass
class _Count:
    sent: int = 0
    received: int = 0
    messages_sent: int = 0
    messages_received: int = 0
    packed: int = 0


@dataclass(frozen=True)
class _Prepared:
    """What depends on the tensors' dtypes and strides; `direct` in a message means: on this side."""

    signature: tuple[object, ...] = ()
    windows: list[list[Message]] = field(default_factory=list)
    bucket: Tensor | None = None


class Transport:
    """Point-to-point execution of one plan between places, again and again with new weights.

    dtype: what travels; that of the destination has the fewest bytes. bucket_bytes: the most memory beyond the weights.
    window: operations in flight. time_limit_s: for one run. Messages go over `link`, or else over `group` (None: the
    default group), whose ranks are the plan's.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        bucket_bytes: int,
        window: int,
        time_limit_s: float,
        link: Link | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.dtype, self.device = rank, dtype, device
        self.link = link if link is not None else GroupLink(group)
        self.bucket_bytes, self.window, self.time_limit_s = bucket_bytes, window, time_limit_s
        self._copies = [m for m in plan.moves if m.source_rank == rank == m.target_rank]
        # either side may have to stage any message, so none may be larger than half a bucket
        most = max(1, bucket_bytes // 2 // dtype.itemsize)
        self._messages = [
            part
            for message in messages_of(plan, itemsize=dtype.itemsize, bucket_bytes=bucket_bytes)
            if rank in (message.source_rank, message.target_rank)
            for part in _parts(message, most)
        ]
        given = [m for message in self._messages if message.source_rank == rank for m in message.moves] + self._copies
        taken = [m for message in self._messages if message.target_rank == rank for m in message.moves] + self._copies
        self._source_keys = {m.source_key: m.name for m in given}
        self._target_keys = {m.target_key: m.name for m in taken}
        self._prepared = _Prepared()

    def close(self) -> None:
        """End the link: peers that wait for this place learn of it."""
        self.link.close()

    @torch.no_grad()
    def run(self, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Transfer:
        """Move `source` (this place's local tensors by key) into `target` (likewise); blocks until this place is done.

        After the first run nothing is allocated. On CUDA the last copies into `target` may still be under way on the
        current stream.

        Raises:
            RunError: a tensor is missing, has another shape than the layout says or would lose range; a peer is late or
                gone. After an error the link is closed and `target` may hold a mixture.
        """
        started = time.monotonic()
        count = _Count()
        try:
            self._prepare(source, target)
            for move in self._copies:
                self._target_view(target, move).copy_(self._source_view(source, move))
            for window in self._prepared.windows:
                self._carry(window, source, target, started, count)
        except RunError:
            self.close()
            raise
        copied = sum(m.elements * target[m.target_key].dtype.itemsize for m in self._copies)
        return Transfer(
            bytes_sent=count.sent,
            bytes_received=count.received,
            messages_sent=count.messages_sent,
            messages_received=count.messages_received,
            bytes_copied=copied,
            bytes_packed=count.packed,
            seconds=time.monotonic() - started,
        )

    def _carry(
        self,
        window: Sequence[Message],
        source: Mapping[str, Tensor],
        target: Mapping[str, Tensor],
        started: float,
        count: _Count,
    ) -> None:
        """Post a window, wait for it, and unpack what came through the bucket as it comes."""
        receives: list[Operation] = []
        sends: list[Operation] = []
        arriving: dict[int, Message] = {}  # by the address of the buffer
        used = 0
        for message in window:
            sending = message.source_rank == self.rank
            peer = message.target_rank if sending else message.source_rank
            if message.direct:
                view_of = self._source_view if sending else self._target_view
                buffer = view_of(source if sending else target, message.moves[0]).view(-1)
            else:
                buffer = self._prepared.bucket[used : used + message.elements]
                used += message.elements
                count.packed += buffer.nbytes
                if sending:
                    for part, move in _split(buffer, message.moves):
                        part.copy_(self._source_view(source, move))
                else:
                    arriving[buffer.data_ptr()] = message
            if sending:
                count.sent, count.messages_sent = count.sent + buffer.nbytes, count.messages_sent + 1
            else:
                count.received, count.messages_received = count.received + buffer.nbytes, count.messages_received + 1
            (sends if sending else receives).append(Operation(peer, buffer, sending, _content(message)))
        for pending in self.link.post(receives + sends):
            await_all([pending], place=self.rank, started=started, time_limit_s=self.time_limit_s)
            for operation in pending.operations:
                message = None if operation.sending else arriving.get(operation.tensor.data_ptr())
                if message is not None:
                    for part, move in _split(operation.tensor, message.moves):
                        self._target_view(target, move).copy_(part)

    def _prepare(self, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        """Check the tensors and cut the windows, if they are not like those of the last run."""
        signature = (*self._look("source", self._source_keys, source), *self._look("target", self._target_keys, target))
        if self._prepared.bucket is not None and signature == self._prepared.signature:
            return
        for move in self._copies:
            check_range_kept(move.name, self._source_view(source, move).dtype, self._target_view(target, move).dtype)
        messages = []
        for message in self._messages:
            sending = message.source_rank == self.rank
            for move in message.moves:
                if sending:
                    check_range_kept(move.name, self._source_view(source, move).dtype, self.dtype)
                else:
                    check_range_kept(move.name, self.dtype, self._target_view(target, move).dtype)
            first = message.moves[0]
            tensor = source[first.source_key] if sending else target[first.target_key]
            ready = message.direct and tensor.dtype == self.dtype and tensor.is_contiguous()
            messages.append(replace(message, direct=ready))
        windows = windows_of(
            messages,
            self.rank,
            itemsize=self.dtype.itemsize,
            bucket_bytes=self.bucket_bytes,
            most_operations=self.window,
        )
        staged = max((sum(m.elements for m in window if not m.direct) for window in windows), default=0)
        bucket = torch.empty(staged, dtype=self.dtype, device=self.device)
        self._prepared = _Prepared(signature, windows, bucket)

    def _look(self, side: str, keys: Mapping[str, str], tensors: Mapping[str, Tensor]) -> Iterator[object]:
        for key, name in keys.items():
            if key not in tensors:
                raise RunError(f"resharding: place {self.rank} has no {side} tensor {key}, where {name} should lie")
            tensor = tensors[key]
            yield tensor.dtype, tensor.shape, tensor.is_contiguous()

    def _source_view(self, source: Mapping[str, Tensor], move: Move) -> Tensor:
        return checked_view(source, move.source_key, move.source_offset, move, self.rank)

    def _target_view(self, target: Mapping[str, Tensor], move: Move) -> Tensor:
        return checked_view(target, move.target_key, move.target_offset, move, self.rank)


def local_view(tensors: Mapping[str, Tensor], key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """The box of `shape` at `offset` of the local tensor `key`, no copy."""
    view = tensors[key]
    for dimension, (start, size) in enumerate(zip(offset, shape, strict=True)):
        view = view.narrow(dimension, start, size)
    return view


def checked_view(tensors: Mapping[str, Tensor], key: str, offset: tuple[int, ...], move: Move, place: int) -> Tensor:
    """`local_view` of one end of a move.

    Raises:
        RunError: `tensors` lacks the key, or its tensor does not hold the box; names the place and the tensor.
    """
    try:
        return local_view(tensors, key, offset, move.shape)
    except KeyError:
        raise RunError(f"resharding: place {place} has no tensor {key}, where {move.name} should lie") from None
    except (RuntimeError, IndexError, ValueError):
        raise RunError(
            f"resharding: place {place}: {key} has shape {tuple(tensors[key].shape)}, which has no box {move.shape} at "
            f"{offset} for {move.name}; the tensor is not the one of the layout"
        ) from None


def _parts(message: Message, most_elements: int) -> Iterator[Message]:
    """A direct message in pieces of at most `most_elements`; others are small enough already."""
    if not message.direct or message.elements <= most_elements:
        yield message
        return
    for move in cut(message.moves[0], most_elements):
        yield replace(message, moves=(move,), elements=move.elements)


def _split(buffer: Tensor, moves: Sequence[Move]) -> Iterator[tuple[Tensor, Move]]:
    """The parts of a flat buffer, each in the shape of its move."""
    start = 0
    for move in moves:
        yield buffer[start : start + move.elements].view(move.shape), move
        start += move.elements


def _content(message: Message) -> str:
    first = message.moves[0].name
    return first if len(message.moves) == 1 else f"{first} and {len(message.moves) - 1} more"
