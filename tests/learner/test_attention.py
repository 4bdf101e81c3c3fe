"""Attention over a pack against the softmax written out, one sequence at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.learner import megatron_cpu

megatron_cpu.install()

from dapo_megatron.learner.attention import packed_causal_attention  # noqa: E402


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scale: float | None) -> torch.Tensor:
    """softmax(q kᵀ · scale, j ≤ i) v of each sequence and head; kv heads are shared by neighbouring query heads."""
    share = q.shape[1] // k.shape[1]
    parts = []
    start = 0
    for n in lengths:
        rows = slice(start, start + n)
        q_HLD = q[rows].transpose(0, 1)
        k_HLD, v_HLD = (x[rows].transpose(0, 1).repeat_interleave(share, 0) for x in (k, v))
        scores = q_HLD @ k_HLD.transpose(1, 2) * (q.shape[2] ** -0.5 if scale is None else scale)
        later = torch.ones(n, n, dtype=torch.bool).triu(1)
        parts.append((scores.masked_fill(later, -torch.inf).softmax(-1) @ v_HLD).transpose(0, 1))
        start += n
    return torch.cat(parts)


def tensors(total: int, heads: int, kv_heads: int, size: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(total, heads, size), (total, kv_heads, size), (total, kv_heads, size)]
    return [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=7),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 2), (3, 1)]),
    size=st.sampled_from([2, 8]),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=80)
def test_values_and_gradients(lengths, heads, size, scale, seed):
    inputs = tensors(sum(lengths), *heads, size, seed)
    found = packed_causal_attention(*inputs, offsets(lengths), scale)
    wanted = by_hand(*inputs, lengths, scale)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    for mine, theirs in zip(
        torch.autograd.grad((found * weight).sum(), inputs),
        torch.autograd.grad((wanted * weight).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_empty_sequences_are_passed_over():
    inputs = tensors(5, 2, 2, 4, 0)
    found = packed_causal_attention(*inputs, torch.tensor([0, 2, 2, 5, 5], dtype=torch.int32), None)
    torch.testing.assert_close(found, by_hand(*inputs, [2, 3], None))


@pytest.mark.parametrize("changed", [0, 4, 8])
def test_a_row_reaches_only_later_rows_of_its_own_sequence(changed):
    lengths, starts = [4, 4, 3], [0, 4, 8]  # alike enough to share one padded call
    q, k, v = (x.detach() for x in tensors(11, 2, 1, 4, 1))
    before = packed_causal_attention(q, k, v, offsets(lengths), None)
    k2, v2 = k.clone(), v.clone()
    k2[changed + 1] += 1
    v2[changed + 1] -= 1
    moved = (packed_causal_attention(q, k2, v2, offsets(lengths), None) != before).any(dim=2).any(dim=1)
    end = changed + lengths[starts.index(changed)]
    assert moved.nonzero().squeeze(1).tolist() == list(range(changed + 1, end))
