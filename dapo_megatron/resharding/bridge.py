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
from dapo_megatron.resharding.transport import Transport
from dapo_megatron.resharding.vllm_layout import vllm_layout


@dataclass(frozen=True)
class Bridge:
    """One learner world, `engines` engines of `tensor` workers each, and how weights travel between them.

    transport: "shared" = workers copy out of the learner ranks' own memory (one machine); "group" = messages.
    """

    architecture: Architecture
    layout: Layout
    layer_spec: str
    engines: int
    tensor: int
    dtype: str  # of the engines' weights, e.g. "bfloat16"
    transport: Literal["shared", "group"]
    bucket_bytes: int
    window: int
    time_limit_s: float

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
        return cached_plan(source, target)

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
        known = {"architecture": Architecture(**architecture), "layout": Layout(**values["layout"])}
        return cls(**{**values, **known})
