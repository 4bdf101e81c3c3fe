"""Learner weights into vLLM engines: all learner ranks and all workers carry out one plan, each its own part.

    meet      once an epoch (and again after an engine was restarted): store, plan, link, shared memory or both
    push      pause → move → every worker's word that it has all → checksums → new version, empty caches → resume

An engine that fails is restarted, and the push begins anew. Until a push has succeeded the engines stay paused, so no
token is ever drawn from half-written weights.
"""

import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from dapo_megatron.agreement import everyone, from_rank_zero
from dapo_megatron.config import Recipe
from dapo_megatron.errors import RunError
from dapo_megatron.learner.learner import Learner
from dapo_megatron.resharding.bridge import Bridge
from dapo_megatron.resharding.checksum import checksum
from dapo_megatron.resharding.relay import Relay
from dapo_megatron.resharding.shared_memory import Export, export_tensors
from dapo_megatron.resharding.transport import Transport, local_view
from dapo_megatron.rollout.fleet import STEER_S, EnginesLost
from dapo_megatron.rollout.vllm_engines import VLLMEngines

POLL_S = 0.002
STEERING_ERRORS = (RunError, OSError, LookupError, ValueError)  # of rank 0 alone; the others must learn of them
TRIES = 3  # of a push that fails although no engine is dead
SLACK_S = 10.0  # routes answer this much after the workers' own time limit at the latest


@dataclass(frozen=True)
class Transfer:
    """bytes_sent: into all engines, as the workers counted them; seconds: from the last learner rank's readiness."""

    bytes_sent: int
    seconds: float


@dataclass(frozen=True)
class _Failure:
    """Engines that are dead (perhaps none: then the attempt alone has failed), and why."""

    dead: list[int]
    reasons: list[str]


class EngineSync:
    """Carries the learner's weights into the engines of a run; every method is collective over the learner's ranks."""

    def __init__(self, recipe: Recipe, learner: Learner, engines: VLLMEngines, bridge: Bridge) -> None:
        settings = recipe.resharding
        self.learner, self.engines, self.bridge = learner, engines, bridge
        self.enabled, self.verify, self.time_limit_s = settings.enabled, settings.verify, settings.time_limit_s
        self.rank, self.world = engines.rank, engines.world
        self.version = -1
        self._verified = self._asleep = False
        self._epoch: str | None = None  # None: engines and learner have not met
        self._epochs = self._updates = 0
        self._export: Export | None = None
        self._transport: Transport | None = None
        self._relay: Relay | None = None
        self._store = self._open_store()

    def push(self, version: int) -> Transfer | None:
        """Move the present weights into all engines as policy `version`; None when `resharding.enabled` is false.

        The first push always happens: an engine starts without weights.

        Raises:
            EnginesLost: engines failed and may not be restarted.
            RunError: the transfer failed for another reason, on every rank alike.
        """
        if self.version >= 0 and not self.enabled:
            return None
        self.engines.ready()
        tries = TRIES
        while True:
            failed = self._meet() if self._epoch is None or not self._still_exported() else None
            if failed is None:
                verify = self.verify == "always" or (self.verify == "first" and not self._verified)
                transfer, failed = self._move(version, verify=verify)
            if failed is None:
                self.version, self._verified = version, self._verified or verify
                return transfer
            self._epoch = None
            if failed.dead:
                self._restart(failed)
                continue
            tries -= 1
            if tries == 0:
                raise RunError("\n".join(failed.reasons), on_every_rank=True)

    def give_way(self) -> None:
        """Let engines on the learner's own GPUs drop weights and KV cache until the next push; collective."""
        if not self.engines.sleep or (self.version >= 0 and not self.enabled):  # the first push always comes
            return
        self.engines.ready()
        self._asleep = True
        while failed := self._on_rank_zero(self.engines.fleet.sleep if self.rank == 0 else None):
            self._epoch = None
            if not failed.dead:
                raise RunError("\n".join(failed.reasons), on_every_rank=True)
            self._restart(failed)
            self.engines.ready()  # a new engine is awake, and has the memory that is wanted

    def refill(self) -> None:
        """Give restarted engines the present weights: the same policy version again.

        Raises:
            RunError: `resharding.enabled` is false, so the weights that engines had are not to be had any more.
        """
        if not self.enabled:
            raise RunError(
                "resharding.enabled=false: a restarted engine cannot get the run's first weights again; start anew",
                on_every_rank=True,
            )
        self._epoch, self._verified = None, False
        self.push(self.version)

    def close(self) -> None:
        """Let go of links and shared memory."""
        for mover in (self._transport, self._relay):
            if mover is not None:
                mover.close()
        self._transport = self._relay = self._export = self._store = None

    def _restart(self, failed: _Failure) -> None:
        self._verified = False  # the new engines have proven nothing yet
        self.engines.restart(failed.dead, failed.reasons)

    # meeting

    def _open_store(self) -> dist.TCPStore:
        """A store that learner ranks and workers reach, served by rank 0."""
        limit = timedelta(seconds=self.time_limit_s)
        store = address = None
        if self.rank == 0:
            host = self.engines.host
            listener = socket.create_server((host, 0))  # by itself the store would listen on all addresses
            port = listener.getsockname()[1]
            store = dist.TCPStore(
                host, port, is_master=True, timeout=limit, wait_for_workers=False, master_listen_fd=listener.detach()
            )
            address = (host, port)
        self._address = from_rank_zero(address, self.world)
        if store is None:
            store = dist.TCPStore(*self._address, is_master=False, timeout=limit, wait_for_workers=False)
        return store

    def _still_exported(self) -> bool:
        """Whether the memory shown to the workers is still that of the weights, on all ranks."""
        if self.bridge.transport == "group":
            return True
        return all(everyone(self._export.still_valid(self.learner.weights), self.world))

    def _meet(self) -> _Failure | None:
        """Begin an epoch; returns what failed."""
        self._epochs += 1
        self._epoch = f"epoch{self._epochs}"
        bridge, pending = self.bridge, None
        problem = None
        shown = [] if bridge.transport == "group" else [self._show_weights]
        if bridge.transport == "relay":
            shown.append(self._open_relay)
        for show in shown:
            try:
                show()
            except (RunError, RuntimeError, OSError) as error:
                problem = str(error)
            problems = [text for text in everyone(problem, self.world) if text is not None]
            if problems:
                return _Failure([], problems)
        if self.rank == 0:
            host, port = self._address
            bodies = [
                {
                    "init_info": {
                        "bridge": bridge.to_json(),
                        "engine": e,
                        "host": host,
                        "port": port,
                        "epoch": self._epoch,
                    }
                }
                for e in range(bridge.engines)
            ]
            pending = self.engines.fleet.start(self._post_each("/init_weight_transfer_engine", bodies))
        if bridge.transport == "group":
            if self._transport is not None:
                self._transport.close()
            try:
                self._transport = bridge.open_transport(
                    self._store, self.rank, device=self.learner.device, prefix=self._epoch
                )
            except RunError as error:
                problem = str(error)
        failed = self._outcome("joined", pending, problem)[1]
        if failed is None and self._relay is not None:
            self._relay.joined()
        return failed

    def _show_weights(self) -> None:
        """Let the workers of this machine look into this rank's weights."""
        self._export = export_tensors(self.learner.weights)
        self._store.set(f"{self._epoch}/export/{self.rank}", json.dumps(self._export.describe()))

    def _open_relay(self) -> None:
        """Join the other learner ranks, and let workers of this machine look into what comes from them."""
        if self._relay is not None:
            self._relay.close()
            self._relay = None
        device, prefix = self.learner.device, f"{self._epoch}/ranks"
        self._relay = self.bridge.open_relay(self._store, self.rank, device=device, prefix=prefix)
        self._store.set(f"{self._epoch}/relay/{self.rank}", json.dumps(self._relay.describe()))

    # one update

    def _move(self, version: int, *, verify: bool) -> tuple[Transfer | None, _Failure | None]:
        started = time.perf_counter()
        self._updates += 1
        uid = f"{version}.{self._updates}"
        if self.learner.device.type == "cuda":
            torch.cuda.synchronize(self.learner.device)
            if self._asleep:
                torch.cuda.empty_cache()  # what learning needed is free; the engine that wakes up cannot know
        dist.barrier()  # from here on no rank's weights change, and none keeps memory for itself
        pending, problem = None, None
        if self.rank == 0:
            pending = self.engines.fleet.start(self._update_all({"update_info": {"uid": uid, "verify": verify}}))
        try:
            if self._transport is not None:
                self._transport.run(self.learner.weights, {})
            if self._relay is not None:
                self._relay.run(self.learner.weights)
        except (RunError, RuntimeError) as error:  # torch's own too: memory, a communicator that broke
            problem = str(error)
        answers, failed = self._outcome(f"done/{uid}", pending, problem)
        if failed is None and verify:
            self._compare(answers)
        if failed is None:
            failed = self._finish(version)
        if failed is not None:
            return None, failed
        received = sum(answer["bytes"] for answer in answers.values())
        return Transfer(received, time.perf_counter() - started), None

    async def _update_all(self, body: dict[str, Any]) -> None:
        """Pause and receive; answers come when the workers are through, whatever came of it."""
        limit = self.time_limit_s + SLACK_S

        async def update(client: Any) -> None:
            if self._asleep:  # first, for an engine that is awake already, as a new one is, would go on by it
                await client.post("/wake_up?tags=weights", time_limit_s=STEER_S)
            await client.post("/pause?mode=keep", time_limit_s=STEER_S)
            await client.post("/start_weight_update", time_limit_s=STEER_S)
            await client.post("/update_weights", body, time_limit_s=limit)
            await client.post("/finish_weight_update", time_limit_s=STEER_S)

        await self.engines.fleet.at_each(update)

    async def _post_each(self, path: str, bodies: list[dict[str, Any]]) -> None:
        limit = self.time_limit_s + SLACK_S
        waiting = iter(bodies)
        await self.engines.fleet.at_each(lambda client: client.post(path, next(waiting), time_limit_s=limit))

    def _outcome(
        self, key: str, pending: Any, problem: str | None
    ) -> tuple[dict[int, dict[str, Any]], _Failure | None]:
        """Wait for every worker's word under `key`: (place → answer, what failed), alike on all ranks."""
        found: tuple[dict[int, dict[str, Any]], dict[int, str], str | None] = ({}, {}, None)
        if self.rank == 0:
            found = self._await_workers(key, pending)
        told = everyone((problem, self.engines.ended(), found), self.world)
        answers, lost, steering = told[0][2]
        problems = [answer["error"] for _, answer in sorted(answers.items()) if answer["error"] is not None]
        problems += [text for text in (steering, *(text for text, _, _ in told)) if text is not None]
        for _, ended, _ in told:
            lost = lost | ended
        reasons = list(dict.fromkeys([*lost.values(), *problems]))
        return answers, _Failure(sorted(lost), reasons) if reasons else None

    def _await_workers(self, key: str, pending: Any) -> tuple[dict[int, dict[str, Any]], dict[int, str], str | None]:
        """(place → answer, engine → why it is lost, what else went wrong); ends early when an engine is found dead."""
        bridge, deadline = self.bridge, time.monotonic() + self.time_limit_s + 2 * SLACK_S
        missing = [bridge.place(e, t) for e in range(bridge.engines) for t in range(bridge.tensor)]
        answers: dict[int, dict[str, Any]] = {}
        lost: dict[int, str] = {}
        while missing and not lost:
            for place in list(missing):
                name = f"{self._epoch}/{key}/{place}"
                if self._store.check([name]):
                    answers[place] = json.loads(self._store.get(name))
                    self._store.delete_key(name)
                    missing.remove(place)
            lost = self.engines.fleet.lost() | self.engines.ended()
            if pending.done() and pending.exception() is not None:
                break  # a route was refused; nobody will answer
            if missing and time.monotonic() > deadline:
                lost = {
                    (place - bridge.layout.world) // bridge.tensor: f"resharding: place {place} did not say {key!r} "
                    f"within resharding.time_limit_s={self.time_limit_s:.0f}"
                    for place in missing
                }
            if missing:
                time.sleep(POLL_S)
        steering = None
        try:  # also after a failure: what still runs in one engine must not reach into the next attempt
            pending.result(self.time_limit_s + 4 * STEER_S)  # its calls have limits of their own, which end sooner
        except EnginesLost as error:
            lost = dict.fromkeys(error.engines, str(error)) | lost
        except STEERING_ERRORS as error:
            steering = str(error) or type(error).__name__
        return answers, lost, steering

    def _finish(self, version: int) -> _Failure | None:
        """The new version counts from here: caches of the old one are dropped, generation goes on."""

        def finish() -> None:
            fleet = self.engines.fleet
            fleet.update_weights(version)
            if self._asleep:
                fleet.wake("kv_cache")
            fleet.resume()

        failed = self._on_rank_zero(finish)
        self._asleep = self._asleep and failed is not None
        return failed

    def _on_rank_zero(self, steer: Callable[[], None] | None) -> _Failure | None:
        """Let rank 0 steer the engines; returns what failed, alike on all ranks."""
        failed = None
        if self.rank == 0:
            try:
                steer()
            except EnginesLost as lost:
                failed = _Failure(lost.engines, [str(lost)])
            except STEERING_ERRORS as error:
                failed = _Failure([], [str(error) or type(error).__name__])
        return from_rank_zero(failed, self.world)

    def _compare(self, answers: dict[int, dict[str, Any]]) -> None:
        """Compare the checksums of all slices this rank gave with what the workers hold.

        Raises:
            RunError: names tensor, slice and place, on every rank.
        """
        known: dict[tuple, int] = {}
        positions: dict[int, int] = {}
        problem = None
        for move in self.bridge.plan.moves:
            if move.source_rank != self.rank:
                continue
            index = positions.get(move.target_rank, 0)
            positions[move.target_rank] = index + 1
            slot = (move.source_key, move.source_offset, move.shape)
            if slot not in known:
                view = local_view(self.learner.weights, *slot)
                known[slot] = checksum(view.to(self.bridge.torch_dtype))
            if answers[move.target_rank]["sums"][str(self.rank)][index] != known[slot] and problem is None:
                problem = (
                    f"resharding: {move.name} at {move.target_offset} {move.shape} differs at place {move.target_rank} "
                    f"({move.target_key}) from rank {self.rank} ({move.source_key}) after the sync"
                )
        problems = [text for text in everyone(problem, self.world) if text is not None]
        if problems:
            raise RunError("\n".join(problems[:5]), on_every_rank=True)
