"""What both ends of the bridge must agree on: learner ranks and engine workers each make the same plan of it.

Places number all processes: learner ranks first, then worker t of engine e at `layout.world + e · tensor + t`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import torch
import torch.distributed as dist

from dapo_megatron.config import Architecture, Layout
from dapo_megatron.resharding.links import open_link
from dapo_megatron.resharding.megatron_layout import megatron_layout
from dapo_megatron.resharding.plan import Plan, make_plan
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
        """The moves from all learner ranks to all workers; made once in a process, however often it meets others."""
        return _plan_of(self._words)

    @cached_property
    def rounds(self) -> tuple[Round, ...]:
        """What crosses machines under "relay"; likewise."""
        return _rounds_of(self._words)

    @property
    def _words(self) -> str:
        """All that plan and rounds depend on."""
        return json.dumps(self.to_json(), sort_keys=True)

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


@lru_cache(maxsize=2)
def _plan_of(words: str) -> Plan:
    bridge = Bridge.from_json(json.loads(words))
    a, layout = bridge.architecture, bridge.layout
    source = megatron_layout(a, layout, layer_spec=bridge.layer_spec)
    target = vllm_layout(a, engines=bridge.engines, tensor=bridge.tensor, first_rank=layout.world)
    return make_plan(source, target, bridge.topology)


@lru_cache(maxsize=2)
def _rounds_of(words: str) -> tuple[Round, ...]:
    bridge = Bridge.from_json(json.loads(words))
    return relay_rounds(
        _plan_of(words),
        bridge.topology,
        itemsize=bridge.torch_dtype.itemsize,
        bucket_bytes=bridge.bucket_bytes,
        most_operations=bridge.window,
    )
