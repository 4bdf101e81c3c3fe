"""A learner rank's part of a transfer between machines: it sends parcels of its weights to ranks of other machines, and
keeps what comes from there in staging memory until the workers beside it have taken it.

Beyond the weights it holds one bucket: two slots of staging memory and room to pack a round's parcels. Nothing else is
gathered. docs/resharding.md
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dapo_megatron.errors import RunError
from dapo_megatron.resharding.links import Link, Operation, await_all
from dapo_megatron.resharding.plan import Move
from dapo_megatron.resharding.precision import check_range_kept
from dapo_megatron.resharding.relay_schedule import SLOTS, Parcel, Round
from dapo_megatron.resharding.shared_memory import export_tensors
from dapo_megatron.resharding.transport import Transfer, checked_view
from dapo_megatron.resharding.turns import Offer, PeerGone, PeerLate

STAGING = "staging"
PATIENCE = 0.5  # of the time limit: a worker that is silent for so long is left behind, so that all others get through
POLL_S = 0.0001


class Relay:
    """Sends, receives and hands over, round by round, again and again with new weights.

    rounds: of `relay_schedule.relay_rounds`. dtype: what travels, that of the workers' weights. link: joins the learner
    ranks; None where there are no rounds. time_limit_s: for one run.
    """

    def __init__(
        self,
        rounds: Sequence[Round],
        rank: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        time_limit_s: float,
        link: Link | None,
    ) -> None:
        self.rank, self.dtype, self.device = rank, dtype, device
        self.time_limit_s, self.link = time_limit_s, link
        self._outgoing = [[p for p in parcels if p.giver == rank] for parcels in rounds]
        self._incoming = [[p for p in parcels if p.relay == rank] for parcels in rounds]
        self._takers = [sorted(set().union(*(p.takers for p in parcels))) for parcels in self._incoming]
        self.slot = max(map(_elements, self._incoming), default=0)
        self._staging = torch.empty(SLOTS * self.slot, dtype=dtype, device=device)
        self._packing: Tensor | None = None
        self._offers = {place: Offer() for place in sorted(set().union(*self._takers))}
        self._export = export_tensors({STAGING: self._staging}) if self._offers else None
        self._problems: list[str] = []
        self._told_at: dict[int, float] = {}  # by round

    @property
    def held_bytes(self) -> int:
        """Memory beyond the weights."""
        return self._staging.nbytes + (self._packing.nbytes if self._packing is not None else 0)

    def describe(self) -> dict[str, Any]:
        """What the workers beside this rank need to find its staging memory, as plain JSON values."""
        return {
            "slot": self.slot,
            "memory": self._export.describe() if self._export is not None else None,
            "turns": {str(place): offer.describe() for place, offer in self._offers.items()},
        }

    def joined(self) -> None:
        """All workers have opened what `describe` says; call it before the first run."""
        for offer in self._offers.values():
            offer.taken()

    def close(self) -> None:
        """End the link and the workers' pipes: who waits for this rank learns of it."""
        if self.link is not None:
            self.link.close()
        for offer in self._offers.values():
            offer.close()

    @torch.no_grad()
    def run(self, source: Mapping[str, Tensor]) -> Transfer:
        """Carry `source` (this rank's tensors by key) and what comes from other machines; blocks until the workers
        beside this rank have taken everything. After the first run nothing is allocated.

        A worker that is gone or silent does not hold up the others: the error is raised behind the last round.

        Raises:
            RunError: a tensor is missing or would lose range, another rank or a worker is late or gone; named. The
                link is closed after an error.
        """
        started = time.monotonic()
        self._problems = []
        present = set(self._offers)
        try:
            sent, packed, messages = self._walk(source, started, present)
            if self._problems:
                raise RunError("\n".join(self._problems))
        except BaseException:  # also torch's own, as for want of memory: who waits for this rank must learn of it
            self.close()
            raise
        return Transfer(
            bytes_sent=sent,
            bytes_received=sum(map(_elements, self._incoming)) * self.dtype.itemsize,
            messages_sent=messages,
            messages_received=sum(map(len, self._incoming)),
            bytes_copied=0,
            bytes_packed=packed,
            seconds=time.monotonic() - started,
        )

    def _walk(self, source: Mapping[str, Tensor], started: float, present: set[int]) -> tuple[int, int, int]:
        """All rounds; (bytes sent, those of them that were packed, parcels sent)."""
        self._make_room(source)
        sent = packed = messages = 0
        for k, (outgoing, incoming) in enumerate(zip(self._outgoing, self._incoming, strict=True)):
            if k >= SLOTS:
                self._hear(k - SLOTS, started, present)
            operations = [
                Operation(p.giver, self._slot(k)[p.offset : p.offset + p.elements], False, _content(p))
                for p in incoming
            ]
            used = 0
            for parcel in outgoing:
                buffer = self._ready(source, parcel)
                if buffer is None:
                    buffer = self._packing[used : used + parcel.elements]
                    used += parcel.elements
                    self._pack(source, parcel, buffer)
                operations.append(Operation(parcel.relay, buffer, True, _content(parcel)))
            pending = self.link.post(operations)
            await_all(pending, place=self.rank, started=started, time_limit_s=self.time_limit_s)
            self._await_device(operations, started)
            sent += _elements(outgoing) * self.dtype.itemsize
            packed += used * self.dtype.itemsize
            messages += len(outgoing)
            self._tell(k, present)
        for k in range(max(0, len(self._incoming) - SLOTS), len(self._incoming)):
            self._hear(k, started, present)
        return sent, packed, messages

    def _tell(self, k: int, present: set[int]) -> None:
        """Round k lies in its slot."""
        self._told_at[k] = time.monotonic()
        for place in present.intersection(self._takers[k]):
            try:
                self._offers[place].turns.tell()
            except PeerGone:
                self._leave_behind(place, present, "is gone")

    def _hear(self, k: int, started: float, present: set[int]) -> None:
        """Wait until all workers have taken round k, each for so long at most as its copying could take."""
        patience = PATIENCE * self.time_limit_s
        deadline = min(self._told_at[k] + patience, started + self.time_limit_s)
        for place in sorted(present.intersection(self._takers[k])):
            try:
                self._offers[place].turns.hear(deadline)
            except PeerGone:
                self._leave_behind(place, present, "is gone")
            except PeerLate:
                self._leave_behind(place, present, f"did not take round {k} within {patience:g} s")

    def _leave_behind(self, place: int, present: set[int], what: str) -> None:
        present.discard(place)
        self._offers[place].turns.close()
        self._problems.append(f"resharding: place {place}, served by place {self.rank}, {what}")

    def _slot(self, k: int) -> Tensor:
        first = k % SLOTS * self.slot
        return self._staging[first : first + self.slot]

    def _make_room(self, source: Mapping[str, Tensor]) -> None:
        """Check the tensors, and have the memory that packing needs."""
        most = 0
        for parcels in self._outgoing:
            needed = 0
            for parcel in parcels:
                for piece in parcel.pieces:
                    move = piece[0]
                    check_range_kept(move.name, self._view(source, move).dtype, self.dtype)
                if self._ready(source, parcel) is None:
                    needed += parcel.elements
            most = max(most, needed)
        if self._packing is None or self._packing.numel() < most:
            self._packing = torch.empty(most, dtype=self.dtype, device=self.device)

    def _ready(self, source: Mapping[str, Tensor], parcel: Parcel) -> Tensor | None:
        """The parcel where it lies, if it is one piece of memory in the wire's dtype."""
        if len(parcel.pieces) > 1:
            return None
        view = self._view(source, parcel.pieces[0][0])
        return view.reshape(-1) if view.dtype == self.dtype and view.is_contiguous() else None

    def _pack(self, source: Mapping[str, Tensor], parcel: Parcel, buffer: Tensor) -> None:
        first = 0
        for piece in parcel.pieces:
            move = piece[0]
            buffer[first : first + move.elements].view(move.shape).copy_(self._view(source, move))
            first += move.elements

    def _view(self, source: Mapping[str, Tensor], move: Move) -> Tensor:
        return checked_view(source, move.source_key, move.source_offset, move, self.rank)

    def _await_device(self, operations: Sequence[Operation], started: float) -> None:
        """On CUDA a finished wait may only mean that the stream waits: what a worker is told of must be there."""
        if self.device.type != "cuda" or not operations:
            return
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(self.device))
        while not arrived.query():
            if time.monotonic() > started + self.time_limit_s:
                peers = ", ".join(str(peer) for peer in sorted({o.peer for o in operations}))
                raise RunError(
                    f"resharding: place {self.rank} waited {self.time_limit_s:g} s for a round with places {peers}"
                )
            time.sleep(POLL_S)


def _elements(parcels: Iterable[Parcel]) -> int:
    return sum(parcel.elements for parcel in parcels)


def _content(parcel: Parcel) -> str:
    first = parcel.pieces[0][0].name
    return first if len(parcel.pieces) == 1 else f"{first} and {len(parcel.pieces) - 1} more"
