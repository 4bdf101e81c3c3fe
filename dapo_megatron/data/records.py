"""What the learner learns from: B token sequences laid end to end, with one number of each kind a token row.

Row t of a sequence predicts its token t + 1; loss weights, advantages and log-probs are indexed by that row, so the
last row of each sequence never has a weight.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor


@dataclass
class SequenceBatch:
    """B sequences of L_1 … L_B tokens, T = Σ L, on the CPU.

    tokens_T: int32.
    offsets: int64 [B + 1], sequence b is rows offsets[b]:offsets[b + 1].
    loss_weights_T: fp32 ≥ 0, 0 = not trained.
    advantages_T: fp32.
    old_logprobs_T: fp32, the learner's before the step's first update.
    reference_logprobs_T: fp32, the reference policy's; None without one.
    """

    tokens_T: Tensor
    offsets: Tensor
    loss_weights_T: Tensor
    advantages_T: Tensor
    old_logprobs_T: Tensor
    reference_logprobs_T: Tensor | None = None

    @property
    def lengths(self) -> Tensor:
        """[B] int64 tokens a sequence."""
        return self.offsets.diff()

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    def rows(self, sequence: int) -> slice:
        """Rows of one sequence in the flat tensors."""
        return slice(int(self.offsets[sequence]), int(self.offsets[sequence + 1]))

    def select(self, sequences: Sequence[int]) -> "SequenceBatch":
        """A batch of the given sequences, in the given order (copies)."""
        index = flat_rows(self.offsets, sequences)
        offsets = offsets_of([int(self.offsets[s + 1] - self.offsets[s]) for s in sequences])
        flat = {name: tensor[index] for name, tensor in self.state().items() if name != "offsets"}
        return SequenceBatch(offsets=offsets, **flat)

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, for safetensors."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}


def offsets_of(lengths: Sequence[int]) -> Tensor:
    """[0, L_1, L_1 + L_2, …] int64 [B + 1]."""
    return torch.from_numpy(np.concatenate([[0], np.cumsum(np.asarray(lengths, dtype=np.int64))]).astype(np.int64))


def flat_rows(offsets: Tensor, sequences: Sequence[int]) -> Tensor:
    """Flat row numbers of the given sequences, in order, int64."""
    parts = [torch.arange(int(offsets[s]), int(offsets[s + 1])) for s in sequences]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def sequence_batch(prompts: Sequence[np.ndarray], responses: Sequence[np.ndarray]) -> SequenceBatch:
    """Prompt and response token ids (int32) → a batch whose loss weights are 1 on the rows that predict response
    tokens."""
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    offsets = offsets_of(lengths)
    total = int(offsets[-1])
    weights = np.zeros(total, dtype=np.float32)
    for start, prompt, response in zip(offsets[:-1].tolist(), prompts, responses, strict=True):
        first = start + len(prompt) - 1
        weights[first : first + len(response)] = 1.0
    parts = [part for pair in zip(prompts, responses, strict=True) for part in pair]
    tokens = np.concatenate(parts, dtype=np.int32, casting="same_kind")
    return SequenceBatch(
        tokens_T=torch.from_numpy(tokens),
        offsets=offsets,
        loss_weights_T=torch.from_numpy(weights),
        # numpy asks for large pages
        advantages_T=torch.from_numpy(np.zeros(total, np.float32)),
        old_logprobs_T=torch.from_numpy(np.zeros(total, np.float32)),
    )
