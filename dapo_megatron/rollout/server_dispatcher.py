"""Requests to engines that are servers: rank 0 asks them, all ranks learn the completions.

An engine that dies meanwhile is restarted, filled with the present weights, and its requests are drawn again from the
same seeds.
"""

from collections.abc import Callable, Sequence

from dapo_megatron.agreement import from_rank_zero
from dapo_megatron.data.completions import Completion
from dapo_megatron.errors import Interrupted, RunError
from dapo_megatron.rollout.dispatcher import flatten, unflatten
from dapo_megatron.rollout.engine import RolloutRequest
from dapo_megatron.rollout.fleet import EnginesLost
from dapo_megatron.rollout.vllm_engines import VLLMEngines


class ServerDispatcher:
    """The same `generate` as `dispatcher.Dispatcher`, for vLLM engines. `refill` syncs the present weights anew."""

    def __init__(
        self, engines: VLLMEngines, *, rank: int, world: int, time_limit_s: float, refill: Callable[[], object]
    ) -> None:
        self.engines, self.rank, self.world = engines, rank, world
        self.time_limit_s, self.refill = time_limit_s, refill

    def generate(self, requests: Sequence[RolloutRequest], *, group: int = 1) -> list[Completion]:
        """Submit all, collect all, in the order of `requests`; collective. `group` plays no role: any engine may serve
        any request.

        Raises:
            EnginesLost: engines died and may not be restarted.
            RunError: not done within rollout.time_limit_s.
            Interrupted: see `VLLMEngines.heeding`.
        """
        if self.rank == 0:
            self.engines.fleet.submit(requests)
        while True:
            kind, content = from_rank_zero(self._collect() if self.rank == 0 else None, self.world)
            if kind == "done":
                by_ticket = {completion.ticket: completion for completion in unflatten(*content)}
                return [by_ticket[request.ticket] for request in requests]
            if kind == "stopped":
                raise Interrupted
            if kind == "failed":
                raise RunError(content, on_every_rank=True)
            self.engines.restart(*content)
            self.refill()

    def _collect(self) -> tuple[str, object]:
        try:
            limit, stopping = self.time_limit_s, self.engines.stopping
            return "done", flatten(self.engines.fleet.collect(time_limit_s=limit, stopping=stopping))
        except Interrupted:
            return "stopped", None
        except EnginesLost as lost:
            return "lost", (lost.engines, [str(lost)])
        except Exception as error:  # the other ranks wait for a word, whatever it is
            return "failed", str(error) if isinstance(error, RunError) else f"rollout: {type(error).__name__}: {error}"
