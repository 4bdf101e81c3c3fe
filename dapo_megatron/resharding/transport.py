"""Carries out a plan: copies inside a process, point-to-point messages between processes, in windows of bounded size.

All slices that one rank sends to another within a window travel as one flat message, in plan order. Nothing is gathered
or broadcast, and a wait that outlasts its limit names the pair that is late.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_megatron.errors import RunError
from dapo_megatron.resharding.plan import Move, Plan


@dataclass(frozen=True)
class Transfer:
    """What one rank did: bytes and messages it sent, bytes it copied locally, seconds."""

    bytes_sent: int
    messages_sent: int
    bytes_copied: int
    seconds: float


class Transport:
    """Point-to-point execution of one plan between the ranks of a group, again and again with new weights."""

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
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.rank, self.dtype, self.device, self.group = rank, dtype, device, group
        self.time_limit_s = time_limit_s
        self.copies = [m for m in plan.moves if m.source_rank == rank == m.target_rank]
        self.windows = [_by_pair(moves, rank) for moves in _cut(plan, bucket_bytes // dtype.itemsize, window)]

    @torch.no_grad()
    def run(self, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> Transfer:
        """Move `source` (this rank's local tensors by key) into `target` (likewise); blocks until both sides are done.

        Raises:
            RunError: a peer did not send or receive within the time limit.
        """
        started = time.perf_counter()
        for move in self.copies:
            local_view(target, move.target_key, move.target_offset, move.shape).copy_(
                local_view(source, move.source_key, move.source_offset, move.shape)
            )
        sent = messages = 0
        for pairs in self.windows:
            waiting: list[tuple[dist.Work, str]] = []
            arriving: list[tuple[list[Move], Tensor]] = []
            keep_alive = []
            for (giver, taker), moves in pairs.items():
                if giver == self.rank:
                    parts = [local_view(source, m.source_key, m.source_offset, m.shape).reshape(-1) for m in moves]
                    buffer = torch.cat(parts).to(self.dtype)
                    keep_alive.append(buffer)
                    waiting.append((dist.isend(buffer, taker, group=self.group), f"rank {taker} to receive"))
                    sent, messages = sent + buffer.nbytes, messages + 1
                else:
                    buffer = torch.empty(sum(m.elements for m in moves), dtype=self.dtype, device=self.device)
                    arriving.append((moves, buffer))
                    waiting.append((dist.irecv(buffer, giver, group=self.group), f"rank {giver} to send"))
            self._wait(waiting)
            for moves, buffer in arriving:
                for move, part in zip(moves, buffer.split([m.elements for m in moves]), strict=True):
                    view = local_view(target, move.target_key, move.target_offset, move.shape)
                    view.copy_(part.view(move.shape))
        copied = sum(m.elements for m in self.copies) * self.dtype.itemsize
        return Transfer(sent, messages, copied, time.perf_counter() - started)

    def _wait(self, waiting: list[tuple[dist.Work, str]]) -> None:
        for work, whom in waiting:
            try:
                finished = work.wait(timedelta(seconds=self.time_limit_s))
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                raise RunError(
                    f"resharding: rank {self.rank} waited {self.time_limit_s:.0f} s for {whom} weights: {reason}"
                ) from None
            if finished is False:
                raise RunError(f"resharding: rank {self.rank} waited {self.time_limit_s:.0f} s for {whom} weights")


def _cut(plan: Plan, most_elements: int, most_pairs: int) -> Iterator[list[Move]]:
    """Cut the moves between processes into windows, the same on every rank.

    No pair's message exceeds `most_elements` (a single larger move travels alone), no window holds more than
    `most_pairs` messages.
    """
    window: list[Move] = []
    loads: dict[tuple[int, int], int] = {}
    for move in plan.moves:
        if move.source_rank == move.target_rank:
            continue
        pair = (move.source_rank, move.target_rank)
        load = loads.get(pair, 0)
        if window and (load + move.elements > most_elements or (load == 0 and len(loads) >= most_pairs)):
            yield window
            window, loads, load = [], {}, 0
        window.append(move)
        loads[pair] = load + move.elements
    if window:
        yield window


def _by_pair(moves: list[Move], rank: int) -> dict[tuple[int, int], list[Move]]:
    pairs: dict[tuple[int, int], list[Move]] = {}
    for move in moves:
        if rank in (move.source_rank, move.target_rank):
            pairs.setdefault((move.source_rank, move.target_rank), []).append(move)
    return pairs


def local_view(tensors: Mapping[str, Tensor], key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """The box of `shape` at `offset` of the local tensor `key`, no copy."""
    view = tensors[key]
    for dimension, (start, size) in enumerate(zip(offset, shape, strict=True)):
        view = view.narrow(dimension, start, size)
    return view
