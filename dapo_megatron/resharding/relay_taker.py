"""A worker's part of a transfer between machines: it copies what ranks of its machine hold out of their memory, and
what comes from elsewhere out of their staging memory, as it arrives there."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dapo_megatron.errors import RunError
from dapo_megatron.resharding.plan import Plan
from dapo_megatron.resharding.relay import STAGING
from dapo_megatron.resharding.relay_schedule import SLOTS, Parcel, Round
from dapo_megatron.resharding.shared_memory import open_export, pair_of
from dapo_megatron.resharding.topology import Topology
from dapo_megatron.resharding.transport import Transfer, checked_view
from dapo_megatron.resharding.turns import PeerGone, Turns, first_to_speak, open_turns


@dataclass(frozen=True)
class _Visit:
    """What this worker copies out of a rank's slot in one round."""

    into: list[Tensor]
    out_of: list[Tensor]


class RelayTaker:
    """Fills one place's tensors, again and again.

    sources: the opened weights of the ranks of its machine that give it slices. relays: what `Relay.describe` says, by
    rank. target: the destination's tensors by key, of dtype `dtype`. time_limit_s: for one run.

    Raises:
        RunError: a source or target tensor is missing, is not the one of the layout, or would lose range; staging
            memory or pipes cannot be opened.
    """

    def __init__(
        self,
        plan: Plan,
        rounds: Sequence[Round],
        place: int,
        topology: Topology,
        sources: Mapping[int, Mapping[str, Tensor]],
        relays: Mapping[int, Mapping[str, Any]],
        target: Mapping[str, Tensor],
        *,
        dtype: torch.dtype,
        time_limit_s: float,
    ) -> None:
        self.place, self.time_limit_s = place, time_limit_s
        beside = [
            pair_of(move, sources.get(move.source_rank, {}), target, dtype)
            for move in plan.moves
            if move.target_rank == place and topology.machine(move.source_rank) == topology.machine(place)
        ]
        self._turns: dict[int, Turns] = {}
        staging: dict[int, Tensor] = {}
        try:
            for rank, described in relays.items():
                staging[rank] = open_export(described["memory"])[STAGING]
                self._turns[rank] = open_turns(described["turns"][str(place)])
            self._visits = {
                relay: [
                    self._visit(staging[relay][k % SLOTS * relays[relay]["slot"] :], parcels, target)
                    for k, parcels in visits
                ]
                for relay, visits in visits_of(rounds, place).items()
            }
        except RunError:
            self.close()
            raise
        some = max(1, len(beside) // (sum(map(len, self._visits.values())) + 1))
        self._beside = [beside[first : first + some] for first in range(0, len(beside), some)]
        self._bytes = sum(into.nbytes for into, _ in beside)
        self._bytes += sum(t.nbytes for visits in self._visits.values() for visit in visits for t in visit.into)

    @torch.no_grad()
    def run(self) -> Transfer:
        """Copy all slices; blocks until they are there.

        Raises:
            RunError: a rank is late or gone; names it. The pipes are closed then, so that ranks learn of it.
        """
        started = time.monotonic()
        try:
            self._take_all(started)
        except BaseException:
            self.close()
            raise
        return Transfer(
            bytes_sent=0,
            bytes_received=self._bytes,
            messages_sent=0,
            messages_received=0,
            bytes_copied=0,
            bytes_packed=0,
            seconds=time.monotonic() - started,
        )

    def close(self) -> None:
        """Let go of the ranks' pipes."""
        for turns in self._turns.values():
            turns.close()

    def _visit(self, slot: Tensor, parcels: Sequence[Parcel], target: Mapping[str, Tensor]) -> _Visit:
        found = _Visit([], [])
        for parcel in parcels:
            first = parcel.offset
            for piece in parcel.pieces:
                for move in piece:
                    if move.target_rank == self.place:
                        found.into.append(checked_view(target, move.target_key, move.target_offset, move, self.place))
                        found.out_of.append(slot[first : first + move.elements].view(move.shape))
                first += piece[0].elements
        return found

    def _take_all(self, started: float) -> None:
        """Whatever a rank has ready, at once: a rank must only wait for this worker where it is this worker's turn.
        What lies beside is copied while no rank has anything."""
        deadline = started + self.time_limit_s
        beside = iter(self._beside)
        done = dict.fromkeys(self._visits, 0)
        waiting = {relay: self._turns[relay] for relay in self._visits}
        some = next(beside, None)
        while waiting or some is not None:
            relay = first_to_speak(waiting, deadline if some is None else 0.0) if waiting else None
            if relay is not None:
                self._take(relay, self._visits[relay][done[relay]], deadline)
                done[relay] += 1
                if done[relay] == len(self._visits[relay]):
                    del waiting[relay]
            elif some is not None:
                _copy([into for into, _ in some], [out_of for _, out_of in some])
                some = next(beside, None)
            else:
                late = ", ".join(map(str, waiting))
                raise RunError(
                    f"resharding: place {self.place} waited {self.time_limit_s:g} s for place {late} to serve it"
                )

    def _take(self, relay: int, visit: _Visit, deadline: float) -> None:
        try:
            self._turns[relay].hear(deadline)
            _copy(visit.into, visit.out_of)
            self._turns[relay].tell()
        except PeerGone:
            raise RunError(f"resharding: place {self.place} lost place {relay}, which served it") from None


def visits_of(rounds: Sequence[Round], place: int) -> dict[int, list[tuple[int, list[Parcel]]]]:
    """For each rank that serves `place`, the rounds and parcels out of which it takes a part."""
    found: dict[int, list[tuple[int, list[Parcel]]]] = {}
    for k, parcels in enumerate(rounds):
        mine: dict[int, list[Parcel]] = {}
        for parcel in parcels:
            if place in parcel.takers:
                mine.setdefault(parcel.relay, []).append(parcel)
        for relay, some in mine.items():
            found.setdefault(relay, []).append((k, some))
    return dict(sorted(found.items()))


def _copy(into: list[Tensor], out_of: list[Tensor]) -> None:
    """Copy, and be through: what is read may change as soon as this returns."""
    if into:
        torch._foreach_copy_(into, out_of)
        if into[0].is_cuda:
            torch.cuda.synchronize(into[0].device)
