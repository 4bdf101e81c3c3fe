"""One queue over all engines.

The embedded engine lives in every learner rank, so every rank holds the same queue and calls the same methods in step;
a request goes to the engine that is least loaded, and completions are made known to all ranks.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from dapo_megatron.agreement import everyone
from dapo_megatron.data.completions import Completion
from dapo_megatron.errors import RunError
from dapo_megatron.rollout.engine import RolloutEngine, RolloutRequest


class Dispatcher:
    """Hands requests to `world` engines, one a rank; `engine` is this rank's own. `phase`: around its work, by name."""

    def __init__(
        self,
        engine: RolloutEngine,
        *,
        rank: int,
        world: int,
        time_limit_s: float,
        phase: Callable[[str], AbstractContextManager] = nullcontext,
    ) -> None:
        self.phase = phase
        self.engine, self.rank, self.world, self.time_limit_s = engine, rank, world, time_limit_s

    def generate(self, requests: Sequence[RolloutRequest], *, group: int = 1) -> list[Completion]:
        """Submit all, collect all, in the order of `requests`; `group` consecutive requests stay on one engine.

        Raises:
            RunError: an engine came back without some of its completions.
        """
        for owner, share in enumerate(self._assign(requests, group)):
            if owner == self.rank:
                self.engine.submit(share)
        with self.phase("rollout"):
            mine = self.engine.collect(time_limit_s=self.time_limit_s)
        by_ticket = {completion.ticket: completion for completion in self._share(mine)}
        missing = [request.ticket for request in requests if request.ticket not in by_ticket]
        if missing:
            raise RunError(f"rollout: {len(missing)} of {len(requests)} requests came back without a completion")
        return [by_ticket[request.ticket] for request in requests]

    def _assign(self, requests: Sequence[RolloutRequest], group: int) -> list[list[RolloutRequest]]:
        loads = [0] * self.world
        shares: list[list[RolloutRequest]] = [[] for _ in range(self.world)]
        for start in range(0, len(requests), group):
            together = requests[start : start + group]
            least = min(range(self.world), key=lambda e: (loads[e], e))
            loads[least] += sum(len(r.prompt_tokens) + r.max_new_tokens for r in together)
            shares[least].extend(together)
        return shares

    def _share(self, mine: list[Completion]) -> list[Completion]:
        if self.world == 1:
            return mine
        return [completion for part in everyone(flatten(mine), self.world) for completion in unflatten(*part)]


def flatten(completions: Sequence[Completion]) -> tuple:
    """Completions as a few long arrays, quick to send to other ranks."""
    return (
        np.array([c.ticket for c in completions], np.int64),
        np.array([len(c.tokens) for c in completions], np.int64),
        [c.finish_reason for c in completions],
        *(_joined([getattr(c, name) for c in completions]) for name in ("tokens", "logprobs", "policy_versions")),
    )


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays) if arrays else np.zeros(0)


def unflatten(tickets, lengths, reasons, tokens, logprobs, versions) -> list[Completion]:
    """The inverse of `flatten`."""
    stops = np.cumsum(lengths)
    return [
        Completion(int(ticket), tokens[stop - n : stop], logprobs[stop - n : stop], reason, versions[stop - n : stop])
        for ticket, n, stop, reason in zip(tickets, lengths, stops, reasons, strict=True)
    ]
