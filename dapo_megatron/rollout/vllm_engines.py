"""The vLLM engines of a run: which rank starts which one, how all are reached, and what happens when one dies.

Every rank holds this object. Engine processes belong to their owners; rank 0 alone talks to them, through the fleet.
"""

import os
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path

import torch.distributed as dist

from dapo_megatron.errors import RunError
from dapo_megatron.rollout.fleet import EnginesLost, Fleet
from dapo_megatron.rollout.launcher import EngineProcess, EngineSettings, wait_until_ready
from dapo_megatron.rollout.vllm_client import EngineClient
from dapo_megatron.rollout.vllm_secret import make_secret


class VLLMEngines:
    """Start engines, or reach those somebody else started (`servers`); collective, like every method that says so.

    The constructor starts this rank's engines and does not wait; `ready` does.

    Args:
        count: number of engines. settings_of: engine index → how its owner starts it.
        host: the address that an owner binds its engines to.
        servers: addresses of engines that run already; nothing is started or restarted then.
        sleep: engines stand on the learner's GPUs and give way to it between rollouts.
        restarts: how often engines may be restarted in the whole run.
    """

    def __init__(
        self,
        *,
        rank: int,
        world: int,
        count: int,
        settings_of: Callable[[int], EngineSettings],
        host: str,
        servers: Sequence[str],
        logs: Path,
        stop_tokens: Collection[int],
        sleep: bool,
        restarts: int,
        start_limit_s: float,
        capacity: int,
    ) -> None:
        self.rank, self.world, self.count = rank, world, count
        self.settings_of, self.host, self.servers, self.logs = settings_of, host, list(servers), logs
        self.restarts_left, self.start_limit_s = restarts, start_limit_s
        self.secret = _from_rank_zero(make_secret() if rank == 0 else None, world)
        self.stop_tokens, self.capacity, self.sleep = stop_tokens, capacity, sleep
        self.own: dict[int, EngineProcess] = {}
        self.fleet: Fleet | None = None
        self._launch(range(count))

    def ready(self) -> None:
        """Wait until all engines answer, once; collective. `fleet` is there afterwards, on rank 0.

        Raises:
            RunError: an engine ended or was not ready within rollout.start_limit_s; on every rank.
        """
        addresses = self._await(range(self.count))
        if self.rank == 0 and self.fleet is None:
            connect = partial(EngineClient, secret=self.secret, stop_tokens=self.stop_tokens)
            self.fleet = Fleet(connect, [addresses[e] for e in range(self.count)], capacity=self.capacity)

    def owner(self, engine: int) -> int:
        """The rank that starts an engine: owners are spread over the world, engine 0 is rank 0's."""
        return engine * self.world // self.count

    def ended(self) -> dict[int, str]:
        """Engines of this rank whose process is gone, and what to say about it."""
        found = {}
        for engine, process in self.own.items():
            if (code := process.exit_code()) is not None:
                found[engine] = (
                    f"rollout: engine {engine} at {process.address} ended with code {code}; log: {process.log}"
                )
        return found

    def restart(self, engines: Collection[int], reasons: Collection[str]) -> None:
        """Put new engines in the place of dead ones; collective. They hold no weights until the next sync.

        Raises:
            EnginesLost: no restarts are left, or the engines are somebody else's.
        """
        told = "\n".join(reasons)
        if self.servers:
            raise EnginesLost(
                engines, [told, "these engines were started elsewhere (rollout.servers): restart them there"]
            )
        if self.restarts_left < len(engines):
            raise EnginesLost(
                engines, [told, f"engine restarts are used up (rollout.restarts); {len(engines)} more needed"]
            )
        self.restarts_left -= len(engines)
        if self.rank == 0:
            print(f"{told}\nrestarting engine {', '.join(map(str, sorted(engines)))}", flush=True)
        for engine in engines:
            if engine in self.own:
                self.own.pop(engine).stop()
        self._launch(engines)
        addresses = self._await(sorted(engines))
        if self.fleet is not None:
            for engine, address in addresses.items():
                self.fleet.replace(engine, address)

    def close(self) -> None:
        """Stop this rank's engines; on rank 0 the fleet too."""
        if self.fleet is not None:
            self.fleet.close()
            self.fleet = None
        for process in self.own.values():
            process.stop()
        self.own = {}

    def _launch(self, engines: Collection[int]) -> None:
        """Start those of `engines` that are this rank's."""
        for engine in engines:
            if not self.servers and self.owner(engine) == self.rank:
                log = self.logs / f"engine-{engine}.log"
                settings = self.settings_of(engine)
                self.own[engine] = EngineProcess(settings, secret=self.secret, log=log, host=self.host)

    def _await(self, engines: Sequence[int]) -> dict[int, str]:
        """Wait for this rank's part of `engines`; returns the addresses of all of them. Collective."""
        if self.servers:
            return {engine: self.servers[engine] for engine in engines}
        problem = None
        try:
            wait_until_ready([self.own[e] for e in engines if e in self.own], self.start_limit_s)
        except RunError as error:
            problem = str(error)
        told = _gather((problem, {engine: p.address for engine, p in self.own.items()}), self.world)
        problems = [text for text, _ in told if text is not None]
        if problems:
            raise RunError("\n".join(problems), on_every_rank=True)
        everyone = {engine: address for _, addresses in told for engine, address in addresses.items()}
        return {engine: everyone[engine] for engine in engines}


def visible_devices(local_ranks: Sequence[int]) -> tuple[int, ...]:
    """CUDA devices that belong to local ranks, in the numbering of this node."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [int(name) for name in visible.split(",")] if visible else None
    return tuple(names[i] if names else i for i in local_ranks)


def _from_rank_zero(value: str | None, world: int) -> str:
    box = [value]
    if world > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _gather(value: object, world: int) -> list:
    if world == 1:
        return [value]
    everyone: list = [None] * world
    dist.all_gather_object(everyone, value)
    return everyone
