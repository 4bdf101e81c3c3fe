"""The vLLM engines of a run: which rank starts which one, how all are reached, and what happens when one dies.

Every rank holds this object. Engine processes belong to their owners; rank 0 alone talks to them, through the fleet.
"""

import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from dapo_megatron.agreement import everyone, from_rank_zero
from dapo_megatron.config.derive import engine_owner
from dapo_megatron.errors import Interrupted, RequestError, RunError
from dapo_megatron.rollout.fleet import EnginesLost, Fleet
from dapo_megatron.rollout.launcher import EngineProcess, EngineSettings, RunningEngine, still_starting
from dapo_megatron.rollout.vllm_client import EngineClient
from dapo_megatron.rollout.vllm_secret import make_secret

POLL_S = 0.5  # between two looks, at which ranks tell each other, while engines start


class VLLMEngines:
    """Start engines, or reach those somebody else started (`servers`); collective, like every method that says so.

    The constructor starts this rank's engines and does not wait; `ready` does.

    Args:
        count: number of engines. settings_of: engine index → how its owner starts it.
        tensor: ranks on whose devices an engine stands, its owner first; 1 where it has devices of its own.
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
        time_limit_s: float,
        capacity: int,
        tensor: int = 1,
    ) -> None:
        self.rank, self.world, self.count, self.tensor = rank, world, count, tensor
        self.settings_of, self.host, self.servers, self.logs = settings_of, host, list(servers), logs
        self.restarts = self.restarts_left = restarts
        self.start_limit_s, self.time_limit_s = start_limit_s, time_limit_s
        self.secret = from_rank_zero(make_secret() if rank == 0 else None, world)
        self.stop_tokens, self.capacity, self.sleep = stop_tokens, capacity, sleep
        self.own: dict[int, EngineProcess] = {}
        self.fleet: Fleet | None = None
        self._ready = False
        self._problem: str | None = None  # of starting this rank's engines; told together with the others'
        self.stopping: Callable[[], bool] = lambda: False  # whether a signal that counts has come to this rank
        self._launch(range(count))

    @contextmanager
    def heeding(self, stopping: Callable[[], bool]) -> Iterator[None]:
        """Inside, waits for engines end on all ranks by `Interrupted` once `stopping` says so on one of them; waits for
        rollouts once it does on rank 0, which asks for them."""
        before, self.stopping = self.stopping, stopping
        try:
            yield
        finally:
            self.stopping = before

    def ready(self) -> None:
        """Wait until all engines answer, once; collective. `fleet` is there afterwards, on rank 0.

        Raises:
            RunError: an engine could not be started, ended, refuses the secret, or was not ready within
                rollout.start_limit_s; on every rank.
            Interrupted: see `heeding`.
        """
        if self._ready:
            return
        addresses = self._await(range(self.count))
        self._ready = True
        if self.rank == 0:
            connect = partial(EngineClient, secret=self.secret, stop_tokens=self.stop_tokens)
            self.fleet = Fleet(
                connect,
                [addresses[e] for e in range(self.count)],
                capacity=self.capacity,
                time_limit_s=self.time_limit_s,
            )

    def owner(self, engine: int) -> int:
        """The rank that starts an engine."""
        return engine_owner(engine, engines=self.count, tensor=self.tensor, world=self.world)

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
            Interrupted: see `heeding`.
        """
        told = "\n".join(reasons)
        if self.servers:
            raise EnginesLost(
                engines, [told, "these engines were started elsewhere (rollout.servers): restart them there"]
            )
        if self.restarts_left < len(engines):
            enough = self.restarts + len(engines) - self.restarts_left
            used_up = f"rollout.restarts={self.restarts} are used up and {len(engines)} more are needed; use {enough}"
            raise EnginesLost(engines, [told, f"{used_up} or more, or find out why engines die: {self.logs}"])
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
        """Start those of `engines` that are this rank's; what goes wrong is told in `_await`, by all ranks."""
        for engine in engines:
            if self.servers or self.owner(engine) != self.rank:
                continue
            log = self.logs / f"engine-{engine}.log"
            try:
                settings = self.settings_of(engine)
                self.own[engine] = EngineProcess(settings, secret=self.secret, log=log, host=self.host)
            except (RequestError, OSError) as error:
                self._problem = f"rollout: engine {engine} cannot be started: {error}"

    def _await(self, engines: Sequence[int]) -> dict[int, str]:
        """Wait for this rank's part of `engines`; returns the addresses of all of them. Collective."""
        mine: dict[int, EngineProcess | RunningEngine] = dict(self.own)
        if self.servers and self.rank == 0:
            mine = {engine: RunningEngine(self.servers[engine], self.secret) for engine in engines}
        waiting = [mine[e] for e in engines if e in mine]
        problem, self._problem = self._problem, None
        deadline = time.monotonic() + self.start_limit_s
        while True:
            if problem is None:
                try:
                    waiting = still_starting(waiting, self.start_limit_s, deadline)
                except RunError as error:
                    problem = str(error)
            told = everyone((problem, bool(waiting), self.stopping()), self.world)
            if problems := [text for text, _, _ in told if text is not None]:
                raise RunError("\n".join(problems), on_every_rank=True)
            if any(stopping for _, _, stopping in told):
                raise Interrupted
            if not any(missing for _, missing, _ in told):
                break
            time.sleep(POLL_S)
        told = everyone({engine: e.address for engine, e in mine.items()}, self.world)
        found = {engine: address for addresses in told for engine, address in addresses.items()}
        return {engine: found[engine] for engine in engines}


def visible_devices(there: int) -> tuple[str, ...]:
    """The names of the `there` CUDA devices that this process sees, as CUDA_VISIBLE_DEVICES takes them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [name.strip() for name in visible.split(",")] if visible else [str(i) for i in range(there)]
    return tuple(names[:there])
