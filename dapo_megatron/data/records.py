"""What the learner learns from: B sequences, each a prompt and a response, with numbers for each response token.

Nothing of the step's size is made: arrays are views of what completions and groups own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass
class SequenceBatch:
    """B sequences on the CPU: one array each, of the P_b tokens of its prompt or the L_b of its response.

    prompts: int32 [P_b].
    responses: int32 [L_b].
    loss_weights: fp32 [L_b] ≥ 0, 0 = not trained.
    advantages: fp32 [L_b].
    old_logprobs: fp32 [L_b], the learner's before the step's first update.
    reference_logprobs: fp32 [L_b], the reference policy's; None without one.
    old_values, returns: fp32 [L_b], a critic's values before the step's first update and what they should have been;
        None for a policy.
    penalties: fp32 [L_b] ≥ 0, what KL-Cov charges per nat; None without any.

    Arrays are shared, and one number may stand for all tokens of a response (`repeated`): never write into one, put
    another in its place.
    """

    prompts: list[np.ndarray]
    responses: list[np.ndarray]
    loss_weights: list[np.ndarray]
    advantages: list[np.ndarray]
    old_logprobs: list[np.ndarray]
    reference_logprobs: list[np.ndarray] | None = None
    old_values: list[np.ndarray] | None = None
    returns: list[np.ndarray] | None = None
    penalties: list[np.ndarray] | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens a sequence."""
        return [len(p) + len(r) for p, r in zip(self.prompts, self.responses, strict=True)]

    @property
    def weight_sum(self) -> float:
        """Σ of all loss weights, in fp64."""
        return float(sum(weights.sum(dtype=np.float64) for weights in self.loss_weights))

    def __len__(self) -> int:
        return len(self.prompts)

    def length(self, sequence: int) -> int:
        """Tokens of one sequence."""
        return len(self.prompts[sequence]) + len(self.responses[sequence])


def repeated(value: float, tokens: int) -> np.ndarray:
    """fp32 [tokens], read-only: one number in memory, read for every token."""
    # as np.broadcast_to, four times as fast
    return np.ndarray(tokens, np.float32, np.float32(value).tobytes(), strides=(0,))


def sequence_batch(prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> SequenceBatch:
    """Prompt and response token ids → a batch whose loss weights are 1; advantages and log-probs are 0."""
    zeros = [repeated(0.0, len(r)) for r in responses]
    return SequenceBatch(
        prompts=list(prompts),
        responses=list(responses),
        loss_weights=[repeated(1.0, len(r)) for r in responses],
        advantages=zeros,
        old_logprobs=list(zeros),
    )
