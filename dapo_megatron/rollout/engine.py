"""The rollout protocol: requests in, completions out, weights replaced in between.

    submit(requests)          queue them; returns at once
    collect(until, …)         completions as they finish, at least `until` of them or all
    abort(tickets)            take requests back; what they produced so far is returned
    pause() / resume()        stop and go on between two tokens
    update_weights(version)   tokens from now on belong to this policy version

The synchronous loop is submit, then collect everything.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from dapo_megatron.data.completions import Completion, FinishReason


@dataclass(frozen=True)
class Fork:
    """Tokens whose distribution at temperature 1 has an entropy above `threshold` (nats) are drawn at `temperature`,
    all others at the request's own (arXiv 2506.01939)."""

    temperature: float
    threshold: float


@dataclass(frozen=True)
class RolloutRequest:
    """One sample to draw. `ticket` identifies it; `seed` alone (not its batch mates) decides its random numbers.

    temperature 0 means greedy. top_p < 1 and `fork` are for evaluation only; the embedded engine alone knows `fork`.
    """

    ticket: int
    prompt_tokens: np.ndarray
    seed: int
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    fork: Fork | None = None


@dataclass
class PartialCompletion:
    """What a request has produced so far: token ids, their log-probs, the policy versions that drew them."""

    request: RolloutRequest
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    def completion(self, reason: FinishReason) -> Completion:
        """The record of it."""
        return Completion(
            self.request.ticket,
            np.asarray(self.tokens, np.int32),
            np.asarray(self.logprobs, np.float32),
            reason,
            np.asarray(self.versions, np.int32),
        )


class RolloutEngine(Protocol):
    """What an engine offers; see the module's header."""

    def submit(self, requests: Sequence[RolloutRequest]) -> list[int]: ...

    def collect(self, until: int | None = None, *, time_limit_s: float) -> list[Completion]: ...

    def abort(self, tickets: Collection[int]) -> list[Completion]: ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def update_weights(self, version: int) -> None: ...


def sample_seed(*key: int) -> int:
    """A 64-bit seed from integers (run seed, step, prompt, sample …): equal keys, equal samples, on every machine."""
    return int(np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0])
