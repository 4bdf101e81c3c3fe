"""The receiving side of the bridge inside a vLLM worker: shards go straight into the model's parameters.

vLLM makes one `ShardReceiver` a worker (registered by `vllm_plugin.py`) and calls it for its routes
/init_weight_transfer_engine, /start_weight_update, /update_weights and /finish_weight_update.

Nothing here raises: when one worker of several raises, vLLM's reply queues fall out of step and every later answer is
that of the call before. Outcomes travel through the learner's store instead; what a route answers says nothing.
"""

import json
import traceback
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from dapo_megatron.errors import RunError
from dapo_megatron.resharding.bridge import Bridge
from dapo_megatron.resharding.checksum import checksum
from dapo_megatron.resharding.relay_taker import RelayTaker
from dapo_megatron.resharding.shared_memory import Puller, open_export
from dapo_megatron.resharding.transport import Transport, local_view
from dapo_megatron.resharding.vllm_layout import vllm_local_shapes


@dataclass
class JoinInfo(WeightTransferInitInfo):
    """Body of /init_weight_transfer_engine. `epoch` names this meeting in the store; a restart makes another."""

    bridge: dict[str, Any]
    engine: int
    host: str
    port: int
    epoch: str


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Body of /update_weights. `uid` names this update in the store; `verify` asks for a checksum of each slice."""

    uid: str
    verify: bool = False


class ShardReceiver(WeightTransferEngine[JoinInfo, UpdateInfo]):
    """Receives this worker's slices from the learner ranks that hold them."""

    init_info_cls = JoinInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    store: dist.Store | None = None
    mover: Transport | Puller | RelayTaker | None = None

    def init_transfer_engine(self, init_info: JoinInfo) -> None:
        """Meet the learner: compare parameters with the layout, make the plan, open link or memory."""
        self.shutdown()
        self.bridge = Bridge.from_json(init_info.bridge)
        self.epoch = init_info.epoch
        limit = timedelta(seconds=self.bridge.time_limit_s)
        try:
            self.store = dist.TCPStore(
                init_info.host, init_info.port, is_master=False, timeout=limit, wait_for_workers=False
            )
        except (RuntimeError, ValueError):
            traceback.print_exc()  # without the store there is nobody to tell; the learner will miss the answer
            return
        config = self.parallel_config
        worker = config.data_parallel_index * config.world_size + config.rank
        self.place = self.bridge.place(init_info.engine, worker)
        self._answer("joined", self._join)

    def start_weight_update(self) -> None:
        """Nothing to prepare."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive all slices; tells the outcome (error, bytes, seconds, checksums) through the store."""
        info = self.parse_update_info(update_info)
        self._answer(f"done/{info.uid}", lambda: self._receive(info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Part of vLLM's interface; `update_weights` does the work."""

    def finish_weight_update(self) -> None:
        """Nothing derived from the weights is kept: `vllm_plugin.py` sees to that on a CPU."""

    def shutdown(self) -> None:
        """Let go of the learner; generation goes on."""
        if isinstance(self.mover, Transport | RelayTaker):
            self.mover.close()
        self.store = self.mover = None

    def _join(self) -> dict[str, Any]:
        bridge = self.bridge
        self.parameters = self._checked_parameters()
        if bridge.transport == "group":
            self.mover = bridge.open_transport(self.store, self.place, device=self.device, prefix=self.epoch)
            return {}
        opened = {rank: open_export(self._told("export", rank)) for rank in bridge.sources_of(self.place)}
        if bridge.transport == "shared":
            self.mover = Puller(bridge.plan, self.place, opened, self.parameters, dtype=bridge.torch_dtype)
            return {}
        relays = {rank: self._told("relay", rank) for rank in bridge.relays_of(self.place)}
        self.mover = RelayTaker(
            bridge.plan, bridge.rounds, self.place, bridge.topology, opened, relays, self.parameters,
            dtype=bridge.torch_dtype, time_limit_s=bridge.time_limit_s,
        )  # fmt: skip
        return {}

    def _told(self, what: str, rank: int) -> dict[str, Any]:
        """What a learner rank has left in the store for this meeting."""
        key = f"{self.epoch}/{what}/{rank}"
        self.store.wait([key], timedelta(seconds=self.bridge.time_limit_s))
        return json.loads(self.store.get(key))

    def _checked_parameters(self) -> dict[str, Tensor]:
        """This worker's parameters by name.

        Raises:
            RunError: one is missing, has another shape, was packed away, or is not in the layout.
        """
        found = {name: parameter.data for name, parameter in self.model.named_parameters()}
        expected = vllm_local_shapes(self.bridge.architecture, self.bridge.tensor)
        for name in sorted(set(found) | set(expected)):
            have = tuple(found[name].shape) if name in found else None
            if have != expected.get(name):
                raise RunError(
                    f"resharding: place {self.place}: vLLM holds {name} as {have or 'nothing'}, the layout has "
                    f"{expected.get(name, 'nothing')}: packed or renamed by this vLLM version"
                )
            if found[name].dtype != self.bridge.torch_dtype:
                raise RunError(
                    f"resharding: place {self.place}: {name} is {found[name].dtype}, the bridge carries "
                    f"{self.bridge.dtype}"
                )
        return found

    @torch.no_grad()
    def _receive(self, info: UpdateInfo) -> dict[str, Any]:
        if self.mover is None:
            raise RunError("resharding: this worker has not met the learner")
        mover = self.mover
        transfer = mover.run({}, self.parameters) if isinstance(mover, Transport) else mover.run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        answer = {"bytes": transfer.bytes_received, "seconds": transfer.seconds}
        if info.verify:
            sums: dict[int, list[int]] = {}
            for move in self.bridge.plan.moves:
                if move.target_rank == self.place:
                    view = local_view(self.parameters, move.target_key, move.target_offset, move.shape)
                    sums.setdefault(move.source_rank, []).append(checksum(view))
            answer["sums"] = sums
        return answer

    def _answer(self, key: str, work: Any) -> None:
        """Do `work` and leave its result, or its error, in the store."""
        try:
            answer = {"error": None, **work()}
        except Exception as error:  # told, never raised: see the module's header
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        if self.store is None:
            return  # never met the learner: it misses the answer
        try:
            self.store.set(f"{self.epoch}/{key}/{self.place}", json.dumps(answer))
        except RuntimeError:
            traceback.print_exc()  # the learner is gone
