"""What both ends of the bridge must agree on: learner ranks and engine workers each make the same plan of it.

Places number all processes: learner ranks first, then worker t of engine e at `layout.world + e · tensor + t`.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import torch
import torch.distributed as dist

from dapo_megatron.config import Architecture, Layout
from dapo_megatron.resharding.links import open_link
from dapo_megatron.resharding.megatron_layout import megatron_layout
from dapo_megatron.resharding.plan import Plan, cached_plan
from dapo_megatron.resharding.relay import Relay
from dapo_megatron.resharding.relay_schedule import Round, relay_rounds
from dapo_megatron.resharding.topology import Topology
from dapo_megatron.resharding.transport import Transport
from dapo_megatron.resharding.vllm_layout import vllm_layout


@dataclass(frozen=True)
class Bridge:
    """One learner world, `engines` engines of `tensor` workers each, and how weights travel between them.

    transport: "shared" = workers copy out of the learner ranks' own memory (one machine); "relay" = they do so on each
    of several machines, and what comes from elsewhere goes through a learner rank of theirs; "group" = messages.
    topology: where ranks and workers stand, if workers stand beside ranks; "relay" needs it.
    """

    architecture: Architecture
    layout: Layout
    layer_spec: str
    engines: int
    tensor: int
    dtype: str  # of the engines' weights, e.g. "bfloat16"
    transport: Literal["shared", "relay", "group"]
    bucket_bytes: int
    window: int
    time_limit_s: float
    topology: Topology | None = None

    @property
    def places(self) -> int:
        """Processes in all."""
        return self.layout.world + self.engines * self.tensor

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def place(self, engine: int, worker: int) -> int:
        """Where worker `worker` of engine `engine` stands."""
        return self.layout.world + engine * self.tensor + worker

    @cached_property
    def plan(self) -> Plan:
        """The moves from all learner ranks to all workers."""
        source = megatron_layout(self.architecture, self.layout, layer_spec=self.layer_spec)
        target = vllm_layout(self.architecture, engines=self.engines, tensor=self.tensor, first_rank=self.layout.world)
        return cached_plan(source, target, self.topology)

    @cached_property
    def rounds(self) -> tuple[Round, ...]:
        """What crosses machines under "relay"."""
        return relay_rounds(
            self.plan,
            self.topology,
            itemsize=self.torch_dtype.itemsize,
            bucket_bytes=self.bucket_bytes,
            most_operations=self.window,
        )

    def sources_of(self, place: int) -> list[int]:
        """The learner ranks out of whose own memory the worker at `place` copies."""
        found = {move.source_rank for move in self.plan.moves if move.target_rank == place}
        if self.transport == "relay":
            found = {rank for rank in found if self.topology.machine(rank) == self.topology.machine(place)}
        return sorted(found)

    def relays_of(self, place: int) -> list[int]:
        """The learner ranks that hand the worker at `place` what comes from other machines."""
        return sorted({parcel.relay for parcels in self.rounds for parcel in parcels if place in parcel.takers})

    def open_relay(self, store: dist.Store, rank: int, *, device: torch.device, prefix: str) -> Relay:
        """Meet the other learner ranks at `store`, under a `prefix` that is new each time; this rank's part of "relay".

        Raises:
            RequestError, RunError: as `open_link`; memory that cannot be shared.
        """
        link = None
        if self.rounds:
            world = self.layout.world
            link = open_link(store, rank, world, device=device, time_limit_s=self.time_limit_s, prefix=prefix)
        dtype, limit = self.torch_dtype, self.time_limit_s
        try:
            return Relay(self.rounds, rank, dtype=dtype, device=device, time_limit_s=limit, link=link)
        except BaseException:
            if link is not None:
                link.close()
            raise

    def open_transport(self, store: dist.Store, place: int, *, device: torch.device, prefix: str) -> Transport:
        """Meet all other places at `store`, under a `prefix` that is new each time; this place's part of the plan.

        Raises:
            RequestError, RunError: as `open_link`.
        """
        link = open_link(store, place, self.places, device=device, time_limit_s=self.time_limit_s, prefix=prefix)
        return Transport(
            self.plan,
            place,
            dtype=self.torch_dtype,
            device=device,
            bucket_bytes=self.bucket_bytes,
            window=self.window,
            time_limit_s=self.time_limit_s,
            link=link,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the init request of an engine."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Bridge":
        """The inverse of `to_json`; lists come back as tuples where they were."""
        architecture = dict(values["architecture"])
        architecture["eos_token_ids"] = tuple(architecture["eos_token_ids"])
        known: dict[str, Any] = {"architecture": Architecture(**architecture), "layout": Layout(**values["layout"])}
        if values.get("topology") is not None:
            known["topology"] = Topology(**{name: tuple(ranks) for name, ranks in values["topology"].items()})
        return cls(**{**values, **known})
