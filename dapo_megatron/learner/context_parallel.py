"""Attention over sequences that are cut among context-parallel ranks.

Of a sequence cut into 2·C pieces of equal length, rank r of C has piece r and piece 2·C − 1 − r, so that all have the
same number of (query, key) pairs to compute. Queries stay where they are; keys and values of the whole pack are
gathered, one collective a layer, and their gradients reduced and scattered in the backward pass. Attention of a piece
is causal against the keys up to its own end.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from dapo_megatron.data.packing import PackedBatch, context_rows
from dapo_megatron.learner.alike import alike


@dataclass(frozen=True)
class PieceGroup:
    """Pieces of one place in their sequences, padded to the longest: of B pieces at most Lq queries and Lk keys long.

    query_rows_BL: int64, rows of this rank; inside_BL: which are real. key_rows_BL: int64, rows of the gathered keys.
    seen_B1QK: bool, which keys a query sees.
    """

    query_rows_BL: Tensor
    inside_BL: Tensor
    key_rows_BL: Tensor
    seen_B1QK: Tensor


@dataclass(frozen=True)
class ContextPlan:
    """What attention must know of a pack that is cut among the ranks of `group`: made on the host, once for a
    micro-batch in each part of a pipeline stage, used by every layer of it.

    key_rows: int64, the gathered keys of all pieces end to end; cu_queries, cu_keys: int32, where each piece begins
    among this rank's rows and among those, for one variable-length call.
    """

    group: dist.ProcessGroup
    pieces: tuple[PieceGroup, ...]
    key_rows: Tensor
    cu_queries: Tensor
    cu_keys: Tensor
    longest_queries: int
    longest_keys: int


def plan_context(packed: PackedBatch, group: dist.ProcessGroup) -> ContextPlan:
    """The plan of a micro-batch that `pack` cut for this rank of `group`."""
    size, rank, device = group.size(), group.rank(), packed.tokens_T.device
    borders = packed.cu_seqlens.tolist()
    order = np.concatenate([context_rows(borders, r, size) for r in range(size)])
    gathered = np.empty_like(order)
    gathered[order] = np.arange(len(order))  # a row of the whole pack → where it lies among the gathered ones
    found: list[tuple[int, int, np.ndarray, np.ndarray]] = []  # (place, length, rows of this rank, gathered keys)
    start = 0
    for a, b in pairwise(borders):
        length = (b - a) // (2 * size)
        for place in (rank, 2 * size - 1 - rank):
            found.append((place, length, np.arange(start, start + length), gathered[a : a + (place + 1) * length]))
            start += length
    return ContextPlan(
        group,
        tuple(_group(members, device) for members in _alike(found)),
        torch.from_numpy(np.concatenate([keys for *_, keys in found])).to(device),
        _borders([length for _, length, *_ in found], device),
        _borders([len(keys) for *_, keys in found], device),
        max(length for _, length, *_ in found),
        max(len(keys) for *_, keys in found),
    )


def gather_keys(key_TKD: Tensor, value_TKD: Tensor, plan: ContextPlan) -> tuple[Tensor, Tensor]:
    """Keys and values of all ranks' rows, rank after rank; in the backward pass their gradients are summed over the
    ranks, and each takes back its own."""
    both = torch.cat([key_TKD, value_TKD], dim=-1)
    gathered = gather_from_sequence_parallel_region(both, tensor_parallel_output_grad=True, group=plan.group)
    return gathered.split([key_TKD.shape[-1], value_TKD.shape[-1]], dim=-1)


def attend_pieces(
    query_THD: Tensor, key_SKD: Tensor, value_SKD: Tensor, plan: ContextPlan, scale: float | None
) -> Tensor:
    """[T, heads, d]: causal attention of this rank's rows against gathered keys and values [S = C·T, kv heads, d]."""
    rows, values = [], []
    grouped = query_THD.shape[1] != key_SKD.shape[1]
    for part in plan.pieces:
        q = query_THD[part.query_rows_BL].transpose(1, 2)
        k, v = (x[part.key_rows_BL].transpose(1, 2) for x in (key_SKD, value_SKD))
        result = F.scaled_dot_product_attention(q, k, v, attn_mask=part.seen_B1QK, scale=scale, enable_gqa=grouped)
        rows.append(part.query_rows_BL[part.inside_BL])
        values.append(result.transpose(1, 2)[part.inside_BL])
    return torch.empty_like(query_THD).index_copy(0, torch.cat(rows), torch.cat(values))


def _alike(found: list[tuple]) -> Iterator[list[tuple]]:
    """Pieces of one place and of lengths that little padding makes equal, together."""
    for place in sorted({piece[0] for piece in found}):
        here = [piece for piece in found if piece[0] == place]
        for members in alike([length for _, length, *_ in here]):
            yield [here[i] for i in members]


def _group(members: list[tuple], device: torch.device) -> PieceGroup:
    place, longest = members[0][:2]
    lengths_B = torch.tensor([length for _, length, *_ in members], device=device)
    steps_Q = torch.arange(longest, device=device)
    last_BQ = place * lengths_B[:, None] + torch.minimum(steps_Q[None], lengths_B[:, None] - 1)  # a query's own key
    steps_K = torch.arange((place + 1) * longest, device=device)
    return PieceGroup(
        _padded([rows for _, _, rows, _ in members], device),
        steps_Q[None] < lengths_B[:, None],
        _padded([keys for *_, keys in members], device),
        (steps_K[None, None] <= last_BQ[:, :, None])[:, None],
    )


def _padded(rows: list[np.ndarray], device: torch.device) -> Tensor:
    """[B, L]: each padded to the longest by its last number."""
    longest = max(map(len, rows))
    return torch.from_numpy(np.stack([np.pad(r, (0, longest - len(r)), mode="edge") for r in rows])).to(device)


def _borders(lengths: list[int], device: torch.device) -> Tensor:
    return torch.from_numpy(np.cumsum([0, *lengths], dtype=np.int32)).to(device)
