"""Weights that other processes of the machine read where they lie: no message, one copy, straight into the destination.

A learner rank exports its tensors: on a CPU their storages move, in place, into anonymous shared memory (memfd), so
that parameters, megatron's flat buffers and the optimizer's views all stay what they are. Others map it through
/proc/PID/fd/N: no name in a file system, nothing left behind by a killed process, no limit of /dev/shm. On CUDA the
storages are shared by IPC handles. An export stays valid until a tensor gets another storage.
"""

import base64
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dapo_megatron.errors import RunError
from dapo_megatron.resharding.plan import Move, Plan
from dapo_megatron.resharding.precision import check_range_kept
from dapo_megatron.resharding.transport import Transfer, checked_view

FALLBACK = "send messages instead: resharding.transport=group"
CUDA_FALLBACK = "give engines GPUs of their own: rollout.placement=disaggregated"  # messages need that


@dataclass(frozen=True)
class Export:
    """Tensors by key whose memory other processes of this machine can open; keeps the memory alive."""

    tensors: Mapping[str, Tensor]
    _storages: tuple[dict[str, Any], ...]  # how to open each
    _views: Mapping[str, dict[str, Any]]  # where each tensor lies in them
    _traits: Mapping[str, tuple[object, ...]]

    def describe(self) -> dict[str, Any]:
        """All that `open_export` needs, as plain JSON values."""
        return {"storages": list(self._storages), "tensors": dict(self._views)}

    def still_valid(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether `tensors` are the exported ones and still lie where they did; cheap enough for every transfer."""
        return tensors.keys() == self._traits.keys() and all(
            _traits(tensor) == self._traits[key] for key, tensor in tensors.items()
        )


@torch.no_grad()
def export_tensors(tensors: Mapping[str, Tensor]) -> Export:
    """Make the memory of `tensors` readable for other processes of this machine, in place.

    Tensors that share a storage go on sharing it, and so does everything else that looks into it; only addresses
    change, so export before anything remembers addresses. Meanwhile one storage at a time exists twice.

    Raises:
        RunError: no memory, too many open files, or memory that cannot be shared; names the tensor and the way round.
    """
    found: dict[int, int] = {}  # storage → its number
    storages: list[dict[str, Any]] = []
    views: dict[str, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        storage = tensor.untyped_storage()
        number = found.get(storage._cdata)
        if number is None:
            number = found[storage._cdata] = len(storages)
            storages.append(_share_cuda(key, storage) if storage.device.type == "cuda" else _share(key, storage))
        views[key] = {
            "storage": number,
            "offset": tensor.storage_offset(),
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "dtype": str(tensor.dtype).removeprefix("torch."),
        }
    kept = {key: tensor.detach() for key, tensor in tensors.items()}
    return Export(kept, tuple(storages), views, {key: _traits(tensor) for key, tensor in kept.items()})


def open_export(description: Mapping[str, Any]) -> dict[str, Tensor]:
    """The exported tensors, by key, in another process of the same machine and user: the same memory, to be read only.

    Raises:
        RunError: the exporter has gone, keeps its weights elsewhere by now, or cannot be reached from here.
    """
    storages = [_open_cuda(how) if "handle" in how else _open(how) for how in description["storages"]]
    return {
        key: torch.empty(0, dtype=getattr(torch, view["dtype"]), device=storages[view["storage"]].device).set_(
            storages[view["storage"]], view["offset"], view["shape"], view["stride"]
        )
        for key, view in description["tensors"].items()
    }


class Puller:
    """Fills one place's tensors from the memory of all the places that hold its slices, again and again.

    sources: place → its opened tensors by key (its own ones for moves within the place). target: the destination's
    tensors by key, of dtype `dtype`.

    Raises:
        RunError: a source or target tensor is missing, is not the one of the layout, or would lose range.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        sources: Mapping[int, Mapping[str, Tensor]],
        target: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
    ) -> None:
        self._into: list[Tensor] = []
        self._out_of: list[Tensor] = []
        self._pulled = self._copied = 0
        for move in plan.moves:
            if move.target_rank != rank:
                continue
            into, out_of = pair_of(move, sources.get(move.source_rank, {}), target, dtype)
            self._into.append(into)
            self._out_of.append(out_of)
            if move.source_rank == rank:
                self._copied += into.nbytes
            else:
                self._pulled += into.nbytes

    @torch.no_grad()
    def run(self) -> Transfer:
        """Copy all slices; blocks until they are there. The sources must not change meanwhile: whoever calls sees to
        that, on CUDA after a synchronisation of the source's device."""
        started = time.monotonic()
        if self._into:
            torch._foreach_copy_(self._into, self._out_of)
            if self._into[0].is_cuda:
                torch.cuda.synchronize(self._into[0].device)
        return Transfer(
            bytes_sent=0,
            bytes_received=self._pulled,
            messages_sent=0,
            messages_received=0,
            bytes_copied=self._copied,
            bytes_packed=0,
            seconds=time.monotonic() - started,
        )


def pair_of(
    move: Move, source: Mapping[str, Tensor], target: Mapping[str, Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Where a move of weights that lie open goes to and comes from.

    Raises:
        RunError: a tensor is missing, is not the one of the layout, is not of dtype `dtype`, or would lose range.
    """
    out_of = checked_view(source, move.source_key, move.source_offset, move, move.source_rank)
    into = checked_view(target, move.target_key, move.target_offset, move, move.target_rank)
    if into.dtype != dtype:
        raise RunError(
            f"resharding: {move.target_key} of place {move.target_rank} is {into.dtype}, expected was {dtype}"
        )
    check_range_kept(move.name, out_of.dtype, into.dtype)
    return into, out_of


def _traits(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _share(key: str, storage: torch.UntypedStorage) -> dict[str, Any]:
    """Move a CPU storage into a memfd, if it is not in one yet, and say how to open it."""
    if not sys.platform.startswith("linux"):
        raise RunError(f"resharding: shared memory needs Linux; {FALLBACK}")
    if storage.nbytes() == 0:
        return {"bytes": 0}
    descriptor = storage._share_fd_cpu_()[0] if storage.is_shared() else -1
    if descriptor < 0 or not os.readlink(f"/proc/self/fd/{descriptor}").startswith("/memfd:"):
        _move_into_memfd(key, storage)
        descriptor = storage._share_fd_cpu_()[0]  # the mapping keeps it open as long as the storage lives
    status = os.fstat(descriptor)
    return {"bytes": storage.nbytes(), "pid": os.getpid(), "fd": descriptor, "inode": status.st_ino}


def _move_into_memfd(key: str, storage: torch.UntypedStorage) -> None:
    try:
        descriptor = os.memfd_create("weights", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(descriptor, 0, storage.nbytes())  # else a full memory would kill in mid-copy
            shared = torch.UntypedStorage._new_shared_fd_cpu(descriptor, storage.nbytes())
        finally:
            os.close(descriptor)
    except (OSError, RuntimeError) as error:
        raise RunError(
            f"resharding: {storage.nbytes():,} bytes of shared memory for {key} cannot be had "
            f"({str(error).splitlines()[0]}); {FALLBACK}"
        ) from None
    shared.copy_(storage)
    storage._swap_data_ptr_(shared)


def _open(how: Mapping[str, Any]) -> torch.UntypedStorage:
    size = int(how["bytes"])
    if size == 0:
        return torch.UntypedStorage(0)
    pid, descriptor = int(how["pid"]), int(how["fd"])
    path = f"/proc/{pid}/fd/{descriptor}"
    try:
        status = os.stat(path)
        # a number that is used again, for another file, must not be taken for the weights
        if (status.st_ino, status.st_size) != (how["inode"], size):
            raise RunError(f"resharding: process {pid} keeps its weights elsewhere by now; export them again")
        return torch.UntypedStorage.from_file(path, shared=True, nbytes=size)
    except (OSError, RuntimeError) as error:
        raise RunError(
            f"resharding: the shared weights of process {pid} cannot be opened ({str(error).splitlines()[0]}): it has "
            f"ended, runs on another machine or in another container, or as another user; {FALLBACK}"
        ) from None


def _share_cuda(key: str, storage: torch.UntypedStorage) -> dict[str, Any]:
    try:
        device, handle, size, offset, counter, counter_offset, event, wait = storage._share_cuda_()
    except RuntimeError as error:
        raise RunError(
            f"resharding: the CUDA memory of {key} cannot be shared between processes ({str(error).splitlines()[0]}); "
            f"take expandable_segments:True out of PYTORCH_CUDA_ALLOC_CONF, or {CUDA_FALLBACK}"
        ) from None
    return {
        "device": str(torch.cuda.get_device_properties(device).uuid),
        "handle": _text(handle),
        "bytes": size,
        "offset": offset,
        "counter": _text(counter),
        "counter_offset": counter_offset,
        "event": _text(event),
        "wait": wait,
    }


def _open_cuda(how: Mapping[str, Any]) -> torch.UntypedStorage:
    devices = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
    if how["device"] not in devices:
        raise RunError(
            f"resharding: weights lie on GPU {how['device']}, which this process does not see "
            f"(it sees {', '.join(devices) or 'none'}); {CUDA_FALLBACK}"
        )
    try:
        return torch.UntypedStorage._new_shared_cuda(
            devices.index(how["device"]),
            base64.b64decode(how["handle"]),
            how["bytes"],
            how["offset"],
            base64.b64decode(how["counter"]),
            how["counter_offset"],
            base64.b64decode(how["event"]),
            how["wait"],
        )
    except RuntimeError as error:
        raise RunError(
            f"resharding: shared CUDA weights cannot be opened ({str(error).splitlines()[0]}); {CUDA_FALLBACK}"
        ) from None


def _text(raw: bytes) -> str:
    return base64.b64encode(raw).decode("ascii")
