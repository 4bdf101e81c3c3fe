"""Run on ranks: waits for engines that ends of some, or requests to stop, bring to an end on all."""

import time
from pathlib import Path
from types import SimpleNamespace

import torch.distributed as dist

from dapo_megatron.errors import Interrupted, RunError
from dapo_megatron.rollout import vllm_engines
from dapo_megatron.rollout.server_dispatcher import ServerDispatcher
from dapo_megatron.rollout.vllm_engines import VLLMEngines

LIMIT_S = 60.0


class Silent:
    """In the place of an engine's process: it never answers, and ends by itself after `lasts_s`."""

    lasts_s = float("inf")

    def __init__(self, _settings: object, *, secret: str, log: Path, host: str) -> None:
        self.address, self.log, self.begun = f"http://{host}:1", log, time.monotonic()

    def exit_code(self) -> int | None:
        return None if time.monotonic() < self.begun + self.lasts_s else 0

    def answers(self) -> bool:
        return False

    def tail(self) -> str:
        return "its log"

    def stop(self) -> None: ...


def waits_that_end(payload: dict) -> list[list]:
    """For a request to stop that reaches rank 1 alone, and an engine of rank 1 that ends: what each rank's wait for its
    own engine ended by, and after how many seconds; then the same of rollouts, which rank 0 is to stop asking for."""
    rank, world = dist.get_rank(), dist.get_world_size()
    vllm_engines.EngineProcess = Silent
    found = []
    for ends in (False, True):
        Silent.lasts_s = 0.5 if ends and rank == 1 else float("inf")
        engines = VLLMEngines(
            rank=rank, world=world, count=world, settings_of=lambda _: None, host="127.0.0.1", servers=[],
            logs=Path(payload["logs"]), stop_tokens=[], sleep=False, restarts=0, start_limit_s=LIMIT_S,
            time_limit_s=LIMIT_S, capacity=1,
        )  # fmt: skip
        asked = time.monotonic() + 0.5 if rank == 1 and not ends else float("inf")
        with engines.heeding(lambda asked=asked: time.monotonic() > asked):
            found.append(_ended(engines.ready))

    def collect(*, time_limit_s: float, stopping) -> list:
        assert stopping()
        raise Interrupted

    engines.fleet = SimpleNamespace(submit=lambda _: None, collect=collect, close=lambda: None) if rank == 0 else None
    dispatcher = ServerDispatcher(engines, rank=rank, world=world, time_limit_s=LIMIT_S, refill=lambda: None)
    with engines.heeding(lambda: rank == 0):
        found.append(_ended(lambda: dispatcher.generate([])))
    assert not engines.stopping()
    told: list = [None] * world
    dist.all_gather_object(told, found)
    return told


def _ended(wait) -> list:
    begun = time.monotonic()
    try:
        wait()
    except RunError as error:
        return [type(error).__name__, error.on_every_rank, str(error), time.monotonic() - begun]
    return ["not at all"]
