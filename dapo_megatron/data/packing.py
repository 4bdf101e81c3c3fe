"""Sequences → micro-batches of packed tokens, balanced over data-parallel ranks under a token budget.

A pack lays whole sequences end to end; attention never crosses their borders. Its length is rounded up to a multiple of
the tensor-parallel size (sequence parallelism scatters it). With C context-parallel ranks every sequence is padded to a
multiple of 2·C rows, and each rank takes two of its 2·C pieces: see `context_rows`.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from dapo_megatron.data.records import SequenceBatch
from dapo_megatron.errors import RequestError

PADDING_PIECE = 128


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch of T rows, padding included, on the learner's device. Row t of a sequence predicts its token
    t + 1: weights, advantages and log-probs of a response of L tokens after P of prompt are on rows P − 1 … P + L − 2.
    Under context parallelism the arrays [T] hold this rank's rows alone.

    tokens_T, targets_T, positions_T: int64.
    cu_seqlens: int32 [sequences + 1], of the whole pack; padding is cut into sequences of its own at the end.
    loss_weights_T, advantages_T, old_logprobs_T: fp32; reference_logprobs_T, penalties_T, old_values_T, returns_T too,
        or None.
    trained: int64 [n] rows with a loss weight, in order: known here without asking the device.
    responses: (number in the batch, rows of the whole pack that predict its response) of each sequence, in order.
    longest: rows of the longest sequence.
    length: rows of the whole pack. trained_rows: how many of them have a loss weight.
    rows: int64 [T], which rows of the whole pack this rank has; None where it has all.
    """

    tokens_T: Tensor
    targets_T: Tensor
    positions_T: Tensor
    cu_seqlens: Tensor
    loss_weights_T: Tensor
    advantages_T: Tensor
    old_logprobs_T: Tensor
    trained: Tensor
    responses: tuple[tuple[int, slice], ...]
    longest: int
    length: int
    trained_rows: int
    rows: Tensor | None = None
    reference_logprobs_T: Tensor | None = None
    old_values_T: Tensor | None = None
    returns_T: Tensor | None = None
    penalties_T: Tensor | None = None

    @property
    def context(self) -> int:
        """How many context-parallel ranks share the pack."""
        return self.length // self.tokens_T.numel()

    @property
    def sequences_N(self) -> Tensor:
        """int64 [n]: which sequence each of the `trained` rows belongs to."""
        borders = self.cu_seqlens.long() // self.context  # of every sequence a rank has the same share
        return torch.bucketize(self.trained, borders, right=True) - 1

    def whole(self, values_T: Tensor) -> Tensor:
        """[…, T] of this rank's rows → of all rows of the pack, 0 where another rank has them."""
        if self.rows is None:
            return values_T
        out = values_T.new_zeros(*values_T.shape[:-1], self.length)
        out[..., self.rows] = values_T
        return out


def assign_micro_batches(
    lengths: Sequence[int], *, token_budget: int, data_parallel: int = 1, multiple_of: int = 1
) -> list[list[list[int]]]:
    """[data_parallel][micro-batch] → sequence numbers.

    Every rank gets the same number of micro-batches, a multiple of `multiple_of`.
    Longest first into the emptiest bin; the number of bins is the least at which no bin exceeds the budget. Bins may be
    empty when there are fewer sequences than bins. Deterministic, and remembered for the last few questions: an update
    asks for its packs, and again for how full they were.

    Raises:
        RequestError: a sequence longer than the budget.
    """
    found = _assigned(tuple(lengths), token_budget, data_parallel, multiple_of)
    return [[list(members) for members in rank] for rank in found]


@lru_cache(maxsize=4)
def _assigned(
    lengths: tuple[int, ...], token_budget: int, data_parallel: int, multiple_of: int
) -> list[list[list[int]]]:
    longest = max(lengths, default=0)
    if longest > token_budget:
        raise RequestError(
            f"learner.tokens_per_micro_batch={token_budget} is less than a sequence of {longest} tokens; "
            f"use at least {longest}"
        )
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    large = sum(2 * length > token_budget for length in lengths)  # no two of these fit together
    least = max(1, -(-sum(lengths) // (token_budget * data_parallel)), -(-large // data_parallel))
    micro_batches = -(-least // multiple_of) * multiple_of
    while True:
        bins = _longest_first(order, lengths, micro_batches * data_parallel)
        if max(load for load, _ in bins) <= token_budget:
            break
        micro_batches += -(-micro_batches // (32 * multiple_of)) * multiple_of  # about 3 % more
    # heavy and light bins alternate over ranks, so that each rank's sum is close to the mean
    bins.sort(key=lambda item: (-item[0], item[1]))
    ranks: list[list[list[int]]] = [[] for _ in range(data_parallel)]
    for i, (_, members) in enumerate(bins):
        turn, place = divmod(i, data_parallel)
        ranks[place if turn % 2 == 0 else data_parallel - 1 - place].append(sorted(members))
    return ranks


def _longest_first(order: Sequence[int], lengths: Sequence[int], count: int) -> list[tuple[int, list[int]]]:
    heap: list[tuple[int, int, list[int]]] = [(0, b, []) for b in range(count)]
    for i in order:
        load, b, members = heapq.heappop(heap)
        members.append(i)
        heapq.heappush(heap, (load + lengths[i], b, members))
    return [(load, members) for load, _, members in sorted(heap, key=lambda item: item[1])]


def packing_efficiency(lengths: Sequence[int], assignment: list[list[list[int]]]) -> float:
    """Real tokens / (micro-batches of all ranks · tokens of the largest one): 1.0 when all are equally full."""
    loads = [sum(lengths[i] for i in members) for rank in assignment for members in rank]
    return sum(loads) / (len(loads) * max(loads)) if max(loads, default=0) else 1.0


def packed_length(tokens: int, multiple_of: int) -> int:
    """Rows of a pack of `tokens` tokens: rounded up to `multiple_of`, and at least that many."""
    return max(1, -(-tokens // multiple_of)) * multiple_of


def sequence_rows(tokens: int, context: int) -> int:
    """Rows of a sequence of `tokens` tokens in a pack: padded to a multiple of 2·context where it is cut."""
    return tokens if context == 1 else packed_length(tokens, 2 * context)


def context_rows(cu_seqlens: Sequence[int], rank: int, size: int) -> np.ndarray:
    """int64: the rows of a whole pack that one of `size` context-parallel ranks has, in its order: of each sequence,
    cut into 2·size pieces of equal length, piece `rank` and piece 2·size − 1 − `rank`."""
    parts = []
    for first, stop in pairwise(cu_seqlens):
        piece = (stop - first) // (2 * size)
        for place in (rank, 2 * size - 1 - rank):
            parts.append(np.arange(first + place * piece, first + (place + 1) * piece))
    return np.concatenate(parts)


def pack(
    batch: SequenceBatch,
    sequences: Sequence[int],
    *,
    length: int,
    device: torch.device | str = "cpu",
    context: tuple[int, int] = (0, 1),
) -> PackedBatch:
    """The given sequences as one micro-batch of `length` rows; without sequences it is padding alone.

    context: (rank, size) in the context-parallel group: only this rank's rows are kept. `length` is the whole pack's,
        then a multiple of 2·size.

    Raises:
        ValueError: the sequences have more than `length` tokens.
    """
    rank, size = context
    lengths = [sequence_rows(batch.length(s), size) for s in sequences]
    used = sum(lengths)
    if used > length:
        raise ValueError(f"{used} tokens do not fit into a pack of {length} rows")
    # short sequences of padding: attention over one long one would cost its length squared
    piece = max(PADDING_PIECE // (2 * size), 1) * 2 * size
    lengths += [min(piece, length - first) for first in range(used, length, piece)]
    cu_seqlens = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    tokens_T = np.zeros(length, np.int64)
    positions_T = np.arange(length)
    responses = []
    for s, first in zip(sequences, cu_seqlens.tolist(), strict=False):
        start = first + len(batch.prompts[s])
        stop = start + len(batch.responses[s])
        np.copyto(tokens_T[first:start], batch.prompts[s])
        np.copyto(tokens_T[start:stop], batch.responses[s])
        positions_T[first : first + sequence_rows(stop - first, size)] -= first
        responses.append((s, slice(start - 1, stop - 1)))  # row t predicts token t + 1
    positions_T[used:] = np.arange(length - used) % piece
    targets_T = np.zeros_like(tokens_T)
    targets_T[:-1] = tokens_T[1:]  # the last row of a sequence looks into the next one; its weight is 0

    def on_rows(values: Sequence[np.ndarray]) -> np.ndarray:
        out_T = np.zeros(length, np.float32)
        for s, rows in responses:
            out_T[rows] = values[s]
        return out_T

    host = {
        "tokens_T": tokens_T,
        "targets_T": targets_T,
        "positions_T": positions_T,
        "cu_seqlens": cu_seqlens,
        "loss_weights_T": on_rows(batch.loss_weights),
        "advantages_T": on_rows(batch.advantages),
        "old_logprobs_T": on_rows(batch.old_logprobs),
    }
    for name in ("reference_logprobs", "penalties", "old_values", "returns"):
        if (values := getattr(batch, name)) is not None:
            host[f"{name}_T"] = on_rows(values)
    trained_rows = np.count_nonzero(host["loss_weights_T"] > 0)
    if size > 1:
        host["rows"] = context_rows(cu_seqlens.tolist(), rank, size)
        host |= {name: values[host["rows"]] for name, values in host.items() if name.endswith("_T")}
    host["trained"] = np.flatnonzero(host["loss_weights_T"] > 0)
    return PackedBatch(
        responses=tuple(responses),
        longest=max(lengths),
        length=length,
        trained_rows=trained_rows,
        **{name: torch.from_numpy(values).to(device) for name, values in host.items()},
    )
