"""Prompt groups of random tokens, scored: three responses each, the last of them truncated."""

from collections.abc import Callable

import numpy as np

from dapo_megatron.data.completions import Completion, PromptGroup

SAMPLES = 3


def random_groups(
    seed: int, count: int, *, lengths: tuple[int, int], rewards: Callable[[np.random.Generator], np.ndarray]
) -> list[PromptGroup]:
    """Responses of lengths[0] … lengths[1] − 1 tokens; `rewards` draws those of a group, the first is right."""
    rng = np.random.default_rng(seed)

    def completion(ticket: int) -> Completion:
        tokens = rng.integers(0, 100, int(rng.integers(*lengths))).astype(np.int32)
        reason = "length" if ticket == SAMPLES - 1 else "stop"
        return Completion(ticket, tokens, np.zeros(len(tokens), np.float32), reason, np.zeros(len(tokens), np.int32))

    return [
        PromptGroup(
            i, "", "", rng.integers(0, 100, 4).astype(np.int32), [completion(j) for j in range(SAMPLES)],
            accuracies=np.array([True, False, False]), rewards=rewards(rng).astype(np.float32),
        )
        for i in range(count)
    ]  # fmt: skip
