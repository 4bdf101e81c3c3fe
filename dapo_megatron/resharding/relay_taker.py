"""A worker's part of a transfer between machines: it copies what ranks of its machine hold out of their memory, and
what comes from elsewhere out of their staging memory, round by round."""

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
from dapo_megatron.resharding.turns import PeerGone, PeerLate, Turns, open_turns


@dataclass(frozen=True)
class _Visit:
    """What this worker copies out of one rank's slot in one round."""

    relay: int
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
            slots = {rank: described["slot"] for rank, described in relays.items()}
            self._visits = [
                [self._visit(relay, staging[relay][k % SLOTS * slots[relay] :], parcels, target)
                 for relay, parcels in visits.items()]
                for k, visits in enumerate(visits_of(rounds, place))
            ]  # fmt: skip
        except RunError:
            self.close()
            raise
        step = -(-len(beside) // max(1, len(self._visits)))  # a part of what lies beside while each round is under way
        self._beside = [beside[first : first + step] for first in range(0, len(beside), max(1, step))]
        self._bytes = sum(into.nbytes for into, _ in beside)
        self._bytes += sum(into.nbytes for visits in self._visits for visit in visits for into in visit.into)

    @torch.no_grad()
    def run(self) -> Transfer:
        """Copy all slices; blocks until they are there.

        Raises:
            RunError: a rank is late or gone; names it. The pipes are closed then, so that ranks learn of it.
        """
        started = time.monotonic()
        try:
            for k in range(max(len(self._beside), len(self._visits))):
                for some in self._beside[k : k + 1]:
                    _copy([into for into, _ in some], [out_of for _, out_of in some])
                for visits in self._visits[k : k + 1]:
                    self._take(k, visits, started)
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

    def _visit(self, relay: int, slot: Tensor, parcels: Sequence[Parcel], target: Mapping[str, Tensor]) -> _Visit:
        found = _Visit(relay, [], [])
        for parcel in parcels:
            first = parcel.offset
            for piece in parcel.pieces:
                for move in piece:
                    if move.target_rank == self.place:
                        found.into.append(checked_view(target, move.target_key, move.target_offset, move, self.place))
                        found.out_of.append(slot[first : first + move.elements].view(move.shape))
                first += piece[0].elements
        return found

    def _take(self, k: int, visits: Sequence[_Visit], started: float) -> None:
        for visit in visits:
            turns = self._turns[visit.relay]
            try:
                turns.hear(started + self.time_limit_s)
                _copy(visit.into, visit.out_of)
                turns.tell()
            except PeerLate:
                raise RunError(
                    f"resharding: place {self.place} waited {self.time_limit_s:g} s for place {visit.relay} to have "
                    f"round {k}"
                ) from None
            except PeerGone:
                raise RunError(
                    f"resharding: place {self.place} lost place {visit.relay}, which served it, in round {k}"
                ) from None


def visits_of(rounds: Sequence[Round], place: int) -> list[dict[int, list[Parcel]]]:
    """For each round the parcels that `place` takes a part of, by relay, in the order of ranks."""
    found: list[dict[int, list[Parcel]]] = []
    for parcels in rounds:
        mine: dict[int, list[Parcel]] = {}
        for parcel in parcels:
            if place in parcel.takers:
                mine.setdefault(parcel.relay, []).append(parcel)
        found.append(dict(sorted(mine.items())))
    return found


def _copy(into: list[Tensor], out_of: list[Tensor]) -> None:
    """Copy, and be through: what is read may change as soon as this returns."""
    if into:
        torch._foreach_copy_(into, out_of)
        if into[0].is_cuda:
            torch.cuda.synchronize(into[0].device)
