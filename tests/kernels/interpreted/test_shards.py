"""The statistics of a vocabulary's parts, merged: in one process, with the all-gather taken for granted."""

from unittest import mock

import torch
from dapo_kernels import triton_rows
from dapo_kernels.arguments import Shard
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.kernels.reference import clipped_loss

INFINITY = float("inf")
CLIP = {"eps_low": 0.2, "eps_high": 0.28, "eps_dual": None, "denominator": 3.0, "entropy_coefficient": 0.2}
SETTINGS = triton_rows.ClipSettings(0.8, 1.28, INFINITY, 0.2)
HALF_ULP = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-11}


def by_shards(logits, targets, old, advantages, weights, pieces, vocabulary):
    """(ClippedRows of each rank, the ranks' gradients side by side)."""
    shards = []
    for rank, own in enumerate(logits.chunk(pieces, dim=1)):
        first = rank * own.shape[1]
        shards.append((own.contiguous(), Shard(first, max(0, min(own.shape[1], vocabulary - first)), vocabulary)))
    one = torch.ones(())
    parts = torch.cat([_statistics(own, targets, weights, one, shard) for own, shard in shards])
    results, gradients = [], []
    for own, shard in shards:
        with mock.patch.object(triton_rows, "statistics", lambda *_: parts):
            gradients.append(torch.empty_like(own))
            results.append(
                triton_rows.clipped_loss(
                    own,
                    gradients[-1],
                    targets,
                    old,
                    advantages,
                    weights,
                    torch.full((1,), 3.0),
                    one,
                    shard,
                    object(),
                    SETTINGS,
                )
            )
    return results, torch.cat(gradients, dim=1)


def _statistics(own, targets, weights, one, shard):
    """Of one rank, which may hold nothing but −inf: only the whole may not."""
    with mock.patch.object(triton_rows, "_refuse_on_cpu"):
        return triton_rows.statistics(own, targets, weights, one, shard, None)


@given(
    pieces=st.integers(1, 4),
    columns=st.sampled_from([1, 7, 24, 40]),
    rows=st.integers(1, 6),
    padding=st.integers(0, 9),
    dtype=st.sampled_from(list(HALF_ULP)),
    sigma=st.sampled_from([0.1, 3.0, 30.0]),
    level=st.sampled_from([0.0, -250.0, 1e4]),
    hidden=st.sampled_from(
        ["nothing", "a rank by −inf", "a rank by the lowest number", "columns by the lowest number"]
    ),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=60, phases=[Phase.explicit, Phase.reuse, Phase.generate])
def test_merged_parts_are_the_whole(pieces, columns, rows, padding, dtype, sigma, level, hidden, seed):
    generator = torch.Generator().manual_seed(seed)
    count = pieces * columns
    vocabulary = max(1, count - min(padding, count - columns))
    logits = (torch.randn(rows, count, generator=generator) * sigma + level).to(dtype)
    targets = torch.randint(0, min(columns, vocabulary), (rows,), generator=generator)
    lowest = -INFINITY if "−inf" in hidden else torch.finfo(dtype).min
    if pieces > 1 and "a rank" in hidden:
        logits[:, columns : 2 * columns] = lowest
    elif "columns" in hidden:
        logits[:, 1::3] = lowest
        targets = targets // 3 * 3
    old = torch.randn(rows, generator=generator) - 3
    advantages = torch.randn(rows, generator=generator)
    weights = (torch.rand(rows, generator=generator) > 0.2).float() * 1.5
    wanted = clipped_loss(logits.double().clamp(min=-1e30), targets, old, advantages, weights, **CLIP, vocab=vocabulary)
    results, gradient = by_shards(logits, targets, old, advantages, weights, pieces, vocabulary)
    scale = logits.double()[:, :vocabulary]
    size = 4 * 2**-23 * (1 + torch.where(scale > -1e30, scale.abs(), 0.0).amax(1) + old.abs())
    for rank in results:
        logprobs, ratio, entropy = rank.values
        assert ((logprobs - wanted.logprobs).abs() <= size)[weights > 0].all()
        assert ((entropy - wanted.entropy).abs() <= 2 * size)[weights > 0].all()
        assert torch.equal(torch.stack([logprobs, ratio, entropy]), results[0].values), "ranks must agree to the bit"
    bound = (size * (wanted.c_N.abs() + 2))[:, None] + wanted.gradient_NV.abs() * 2 * HALF_ULP[dtype] + 2**-24
    assert ((gradient - wanted.gradient_NV).abs() <= bound).all()
    assert not gradient[:, vocabulary:].any()
