"""Attention cut among context-parallel ranks is the attention of the whole pack."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.data.packing import context_rows, pack, packed_length, sequence_rows
from dapo_megatron.data.records import sequence_batch
from dapo_megatron.learner.attention import packed_causal_attention
from dapo_megatron.learner.context_parallel import attend_pieces, plan_context
from dapo_megatron.learner.learner import packed_params

HEADS, KV_HEADS, DIM = 4, 2, 8


class Group:
    """Stands in for a process group of one rank's place."""

    def __init__(self, rank: int, size: int) -> None:
        self._place = (rank, size)

    def rank(self) -> int:
        return self._place[0]

    def size(self) -> int:
        return self._place[1]


def packs_of(lengths: list[tuple[int, int]], size: int):
    """The pack as each of `size` ranks has it, and the pack that one rank alone would have, of equal padding."""
    rng = np.random.default_rng(0)
    batch = sequence_batch(
        *([rng.integers(3, 60, n).astype(np.int32) for n in side] for side in zip(*lengths, strict=True))
    )
    batch.loss_weights = [rng.random(n, dtype=np.float32) + 0.5 for _, n in lengths]
    length = packed_length(sum(sequence_rows(p + r, size) for p, r in lengths) + 2 * size, 2 * size)
    everything = range(len(lengths))
    return [pack(batch, everything, length=length, context=(rank, size)) for rank in range(size)], batch


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=5),
    size=st.sampled_from([2, 3, 4]),
)
def test_pieces_attend_as_the_whole_pack_does(lengths, size):
    packs, _ = packs_of(lengths, size)
    rows = [p.rows for p in packs]
    assert torch.equal(torch.cat(rows).sort().values, torch.arange(packs[0].length))
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(packs[0].length, n, DIM, generator=generator, dtype=torch.float64)
        for n in (HEADS, KV_HEADS, KV_HEADS)
    )
    expected = packed_causal_attention(q, k, v, packs[0].cu_seqlens, None)
    gathered = torch.cat(rows)
    for rank, packed in enumerate(packs):
        plan = plan_context(packed, Group(rank, size))
        found = attend_pieces(q[packed.rows], k[gathered], v[gathered], plan, None)
        torch.testing.assert_close(found, expected[packed.rows])
        torch.testing.assert_close(one_call(q[packed.rows], k[gathered], v[gathered], plan), expected[packed.rows])


def one_call(query_THD, key_SKD, value_SKD, plan):
    """What a variable-length kernel does with the plan: causal from the end, a piece's last query sees its last key."""
    k, v = key_SKD[plan.key_rows], value_SKD[plan.key_rows]
    out = torch.full_like(query_THD, torch.nan)
    pieces = zip(pairwise(plan.cu_queries.tolist()), pairwise(plan.cu_keys.tolist()), strict=True)
    for (a, b), (c, d) in pieces:
        assert b - a <= plan.longest_queries and d - c <= plan.longest_keys
        for row in range(a, b):
            seen = slice(c, d - (b - 1 - row))
            keys, values = (x[seen].repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
            weights = (torch.einsum("hd,khd->hk", query_THD[row], keys) / DIM**0.5).softmax(-1)
            out[row] = torch.einsum("hk,khd->hd", weights, values)
    return out


@pytest.mark.parametrize("size", [2, 4])
def test_each_rank_has_its_share_of_every_sequence_and_as_many_pairs(size):
    packs, batch = packs_of([(3, 14), (8, 33), (1, 1), (5, 2)], size)
    pairs = []
    for rank, packed in enumerate(packs):
        plan = plan_context(packed, Group(rank, size))
        pairs.append(sum(int((g.seen_B1QK[:, 0] & g.inside_BL[:, :, None]).sum()) for g in plan.pieces))
        assert packed.context == size and packed.tokens_T.numel() * size == packed.length
    assert len(set(pairs)) == 1
    whole = pack(batch, range(4), length=packs[0].length)
    for s, rows in packs[0].responses:
        weights = sum(p.whole(p.loss_weights_T) for p in packs)[rows]
        np.testing.assert_array_equal(weights, batch.loss_weights[s])
        targets = sum(p.whole(p.targets_T) for p in packs)[rows]
        np.testing.assert_array_equal(targets, batch.responses[s])
    assert sum(p.trained.numel() for p in packs) == packs[0].trained_rows == whole.trained.numel()
    for packed in packs:
        borders = packed.cu_seqlens.long()
        expected = torch.bucketize(packed.rows[packed.trained], borders, right=True) - 1
        assert torch.equal(packed.sequences_N, expected)


def test_a_rank_has_the_pieces_at_equal_distance_from_both_ends():
    assert context_rows([0, 8, 12], 0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert context_rows([0, 8, 12], 1, 2).tolist() == [2, 3, 4, 5, 9, 10]


@settings(deadline=None, max_examples=25)
@given(pieces=st.lists(st.integers(1, 5), min_size=1, max_size=6), size=st.integers(1, 4))
def test_transformer_engines_attention_finds_the_rows_where_it_looks_for_them(pieces, size):
    """Its kernel for packed sequences says of row `token` of rank `rank` which row of the pack it is."""
    borders = np.cumsum([0, *(2 * size * piece for piece in pieces)])
    for rank in range(size):
        own = borders // size
        expected = []
        for token in range(own[-1]):
            sequence = int(np.searchsorted(own, token, side="right")) - 1
            half, index = (own[sequence + 1] - own[sequence]) // 2, token - own[sequence]
            expected.append(borders[sequence] + index + half * (rank if index < half else 2 * (size - 1) - rank))
        assert context_rows(borders.tolist(), rank, size).tolist() == expected


def test_transformer_engine_is_told_the_whole_packs_borders():
    packs, _ = packs_of([(5, 3), (4, 9)], 2)
    params = packed_params(packs[0], "transformer_engine")
    assert params.cu_seqlens_q is params.cu_seqlens_q_padded is params.cu_seqlens_kv_padded is packs[0].cu_seqlens
    assert params.max_seqlen_q == packs[0].longest and not hasattr(params, "context_plan")
    assert params.cu_seqlens_q[-1] == packs[0].length == 2 * len(packs[0].tokens_T)
