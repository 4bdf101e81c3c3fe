"""A scripted engine: what it answers depends on a request's prompt and seed alone, and every request is noted."""

from collections.abc import Sequence

import numpy as np

from dapo_megatron.data.completions import Completion
from dapo_megatron.rollout.engine import RolloutRequest

END = 1  # end of sequence


class ScriptedEngine:
    """Draws tokens 2 … 9 with probability 0.5 or 1, ends with chance `stop` a token; `waves`: the requests of each
    call, `together` the size of the groups that were to stay on one engine."""

    def __init__(self, stop: float = 0.2) -> None:
        self.stop = stop
        self.waves: list[list[RolloutRequest]] = []
        self.together: list[int] = []

    def generate(self, requests: Sequence[RolloutRequest], group: int = 1) -> list[Completion]:
        assert [r.ticket for r in requests] == list(range(len(requests)))
        self.waves.append(list(requests))
        self.together.append(group)
        return [self.answer(request) for request in requests]

    def answer(self, request: RolloutRequest) -> Completion:
        rng = np.random.default_rng([request.seed % 2**32, *request.prompt_tokens.tolist()])
        tokens: list[int] = []
        while len(tokens) < request.max_new_tokens and tokens[-1:] != [END]:
            tokens.append(END if rng.random() < self.stop else int(rng.integers(2, 10)))
        size = len(tokens)
        logprobs = np.log(rng.choice([0.5, 1.0], size)).astype(np.float32)
        reason = "stop" if tokens[-1] == END else "length"
        return Completion(request.ticket, np.array(tokens, np.int32), logprobs, reason, np.zeros(size, np.int32))


def reward_of(tokens: np.ndarray) -> float:
    """What a response is worth: 1 or −1, by its tokens alone."""
    return 1.0 if int(tokens.sum()) % 2 else -1.0
