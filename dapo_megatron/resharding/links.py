"""Links carry flat tensors between places (processes): a window of sends and receives is posted at once, then awaited.

Learner ranks and engine workers are two worlds. `open_link` joins them through a store by a process group of its own,
known to neither world; `GroupLink` also runs over a group of the learner's world. Place i is rank i of the group.
"""

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_megatron.errors import RequestError, RunError

POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class Operation:
    """`tensor` (contiguous) goes to the place `peer`, or is filled by it; `what`: its content, for messages to people.

    Operations between two places match in the order in which each of them posts them.
    """

    peer: int
    tensor: Tensor
    sending: bool
    what: str


@dataclass(frozen=True, slots=True)
class Pending:
    """Operations that are done when `work` is: a single one on gloo, a whole window on NCCL."""

    work: dist.Work
    operations: tuple[Operation, ...]


class Link(Protocol):
    """What a transport needs of a network."""

    def post(self, operations: Sequence[Operation]) -> list[Pending]:
        """Start all operations and return without waiting for any."""

    def close(self) -> None:
        """Give up connections that belong to the link alone; peers that still wait on them fail at once."""


class GroupLink:
    """A link over a process group; None is the default group. Places are global ranks, or those of an `owned` group."""

    def __init__(self, group: dist.ProcessGroup | None = None, *, owned: bool = False) -> None:
        self._group = group
        self._owned = owned

    def post(self, operations: Sequence[Operation]) -> list[Pending]:
        """See Link. On CUDA all operations are one NCCL group call.

        Raises:
            RunError: the link is closed, or a peer's connection is already lost.
        """
        if self._owned and self._group is None:
            raise RunError("resharding: the link is closed; open a new one under another prefix")
        if not operations:
            return []
        group = self._group if self._group is not None else dist.distributed_c10d._get_default_group()
        device = operations[0].tensor.device
        if device.type != "cuda":
            return [Pending(self._start(group, operation), (operation,)) for operation in operations]
        group._start_coalescing(device)
        for operation in operations:
            self._start(group, operation)
        return [Pending(group._end_coalescing(device), tuple(operations))]

    def close(self) -> None:
        """See Link. Only an owned group is ended."""
        if self._owned and self._group is not None:
            group, self._group = self._group, None
            with suppress(RuntimeError):  # a group that has failed has little left to end
                group.abort()

    def _start(self, group: dist.ProcessGroup, operation: Operation) -> dist.Work:
        peer = operation.peer if self._owned else dist.get_group_rank(group, operation.peer)
        try:
            if operation.sending:
                return group.send([operation.tensor], peer, 0)
            return group.recv([operation.tensor], peer, 0)
        except RuntimeError as error:
            raise RunError(
                f"resharding: the connection to place {operation.peer} is lost ({_first_line(error)})"
            ) from None


def open_link(
    store: dist.Store, rank: int, world: int, *, device: torch.device, time_limit_s: float, prefix: str
) -> Link:
    """Join `world` places through `store` into a group of their own: gloo for the CPU, NCCL for CUDA devices.

    `store` is reachable from all places (a TCPStore that one of them serves); `prefix` is new for every link. Returns
    when all places have joined.

    Raises:
        RequestError: a CUDA device and a torch without NCCL.
        RunError: places did not join within the time limit; names them.
    """
    if device.type == "cuda" and not dist.is_nccl_available():
        raise RequestError(f"resharding: a link between {device} tensors needs a torch with NCCL; this one has none")
    limit = timedelta(seconds=time_limit_s)
    store = dist.PrefixStore(prefix, store)
    _await_all(store, rank, world, time_limit_s)
    group = dist.ProcessGroup(store, rank, world)
    try:
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            backend, kind = dist.ProcessGroupNCCL(store, rank, world, options), dist.ProcessGroup.BackendType.NCCL
            # else the first window would make the communicator, and a place without messages would be missing
            backend.eager_connect_single_device(device)
        else:
            backend, kind = dist.ProcessGroupGloo(store, rank, world, limit), dist.ProcessGroup.BackendType.GLOO
    except RuntimeError as error:
        raise RunError(
            f"resharding: place {rank} could not connect to all of {world} places within {time_limit_s:g} s "
            f"({_first_line(error)})"
        ) from None
    group._register_backend(device, kind, backend)
    group._set_default_backend(kind)
    return GroupLink(group, owned=True)


def await_all(pending: Sequence[Pending], *, place: int, started: float, time_limit_s: float) -> None:
    """Wait until everything posted is done, at most until `started` (time.monotonic) + `time_limit_s`.

    Raises:
        RunError: names this place, the place that is late or gone, and what it should have sent or received.
    """
    for waiting in pending:
        left = max(started + time_limit_s - time.monotonic(), 0.001)
        try:
            finished = waiting.work.wait(timedelta(seconds=left))
            reason = "it failed"
        except RuntimeError as error:
            finished, reason = False, _first_line(error)
        if finished is False:
            whom = _whom(waiting.operations)
            if time.monotonic() >= started + time_limit_s:
                raise RunError(f"resharding: place {place} waited {time_limit_s:g} s for {whom}")
            raise RunError(f"resharding: place {place} lost {whom} ({reason})")


def _await_all(store: dist.Store, rank: int, world: int, time_limit_s: float) -> None:
    """Return when all places have come to the store, or raise an error that names those that have not."""
    missing = list(range(world))
    deadline = time.monotonic() + time_limit_s
    try:
        store.set(f"here/{rank}", "yes")
        while missing := [i for i in missing if not store.check([f"here/{i}"])]:
            if time.monotonic() > deadline:
                raise RunError(f"resharding: place {rank} waited {time_limit_s:g} s for {_places(missing)} to join")
            time.sleep(POLL_S)
    except RuntimeError as error:  # dist.DistStoreError is one
        raise RunError(f"resharding: place {rank} lost the store of the link ({_first_line(error)})") from None


def _whom(operations: Sequence[Operation]) -> str:
    parts = []
    for sending, verb in ((False, "send"), (True, "receive")):
        some = [operation for operation in operations if operation.sending == sending]
        if some:
            more = f" and {len(some) - 1} more" if len(some) > 1 else ""
            parts.append(f"{_places(sorted({o.peer for o in some}))} to {verb} {some[0].what}{more}")
    return ", ".join(parts)


def _places(places: Sequence[int]) -> str:
    return f"place{'s' * (len(places) > 1)} {', '.join(map(str, places))}"


def _first_line(error: Exception) -> str:
    text = str(error).splitlines()[0] if str(error) else type(error).__name__
    return text.split("] ", 1)[-1].split(". This is typically")[0][:200]
