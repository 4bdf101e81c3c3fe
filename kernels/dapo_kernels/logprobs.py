"""Log-probability of the target and entropy of each row of vocab-parallel logits.

With z = logits / T, the maximum M and the sum S of exp(z − M) taken over the whole vocabulary, per row:

    l = (z_y − M) − log S                          H = log S − Σ_j p_j (z_j − M),   p_j = exp(z_j − M) / S
    ∂l/∂z_j = 1[j = y] − p_j                       ∂H/∂z_j = −p_j (log p_j + H)

Rank r of the tensor-parallel group holds the global columns [r·V_local, (r+1)·V_local). One all-gather of four numbers
a row (max, Σ exp, target logit, Σ exp·(z − max)) makes the row statistics whole; the backward pass communicates
nothing.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_kernels.arguments import (
    Shard,
    check_logits,
    check_on_cpu,
    check_rows,
    choose_implementation,
    group_of_many,
    inverse_temperature,
    kernel_temperature,
    refuse_second_derivative,
    shard_of,
)
from dapo_kernels.device_errors import NonFiniteLogits, note_on_device

CHUNK_ELEMENTS = 1 << 22  # elements upcast at a time: bounds the extra memory to a few tens of MiB whatever N
CPU_CHUNK_ELEMENTS = 1 << 18  # small enough for a core's cache
LOWEST = -3.0e38  # stands in for −inf where a product with 0 must be 0


class LogprobsAndEntropy(NamedTuple):
    """Per row, fp32 (fp64 for fp64 logits), differentiable; 0 on rows that were not asked for. Not to be changed in
    place before backward."""

    logprobs: Tensor
    entropy: Tensor


def logprobs_and_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    tensor_parallel_group: dist.ProcessGroup | None = None,
    in_place: bool = True,
    implementation: str = "auto",
    row_mask: Tensor | None = None,
) -> LogprobsAndEntropy:
    """l and H of the module's header for every row, differentiable in the logits.

    Args:
        logits: [N, V/TP] bf16, fp16, fp32 or fp64, contiguous. With `in_place` its memory is reused for the gradient.
        targets: [N] int64 global vocabulary ids.
        temperature: T > 0, a number or one a row [N].
        vocab_size: true vocabulary; global columns beyond it count as −inf and get gradient 0. None: every column is
            real.
        tensor_parallel_group: ranks that hold the other columns; None or a group of one: the logits are whole.
        implementation: "auto" (Triton on a GPU, torch elsewhere), "triton" or "torch".
        row_mask: [N] bool; other rows are skipped, return 0 and get gradient 0. None: every row.

    Raises:
        ValueError: shapes, dtypes or T disagree; on a CPU also a target outside the vocabulary, a NaN, or T ≤ 0
            in a tensor, in a row asked for. On a GPU these make the row NaN and set a flag (`device_errors`).
    """
    check_logits(logits)
    count = logits.shape[0]
    check_rows(count, logits.device, targets, row_mask)
    chosen = choose_implementation(implementation, logits.device, logits.dtype)
    shard = shard_of(logits.shape[1], vocab_size, tensor_parallel_group)
    scale = (kernel_temperature if chosen == "triton" else inverse_temperature)(temperature, count, logits)
    check_on_cpu(targets, temperature, shard.vocabulary, row_mask)
    group = group_of_many(tensor_parallel_group)
    if chosen == "triton":
        from dapo_kernels.triton_ops import TritonLogprobs

        mask = None if row_mask is None else row_mask.contiguous().view(torch.uint8)
        return LogprobsAndEntropy(
            *TritonLogprobs.apply(logits, targets.contiguous(), mask, scale, shard, group, in_place)
        )
    rows = torch.arange(count, device=logits.device) if row_mask is None else row_mask.nonzero().squeeze(1)
    return LogprobsAndEntropy(*_RowLogprobs.apply(logits, targets, rows, scale, shard, group, in_place))


class RowStatistics(NamedTuple):
    """M, log S, l and H of the rows asked for, [n]."""

    maximum: Tensor
    log_sum: Tensor
    logprobs: Tensor
    entropy: Tensor


def row_statistics(
    logits: Tensor,
    targets: Tensor,
    rows: Tensor,
    inverse_temperature: Tensor,
    shard: Shard,
    group: dist.ProcessGroup | None,
) -> RowStatistics:
    """Statistics of the given rows over all ranks: one pass in chunks, one all-gather.

    Raises:
        ValueError: on a CPU, a row holds a NaN, a +inf or nothing but −inf.
    """
    statistics = torch.cat(
        [
            _local_statistics(_scaled(logits, chunk, inverse_temperature, shard), targets[chunk] - shard.first)
            for _, chunk in _row_chunks(rows, logits.shape[0], shard.valid)
        ]
        or [torch.empty(0, 4, dtype=inverse_temperature.dtype, device=logits.device)]
    )
    found = _combine(statistics, group)
    if logits.device.type == "cpu":
        if not bool(torch.isfinite(found.log_sum).all()):
            bad = rows[~torch.isfinite(found.log_sum)][0].item()
            raise NonFiniteLogits(f"logits row {bad} holds a NaN, a +inf or nothing but −inf")
        return found
    note_on_device(logits.device, "logits", ~torch.isfinite(found.log_sum).all())
    known = (targets[rows] >= 0) & (targets[rows] < shard.vocabulary)
    note_on_device(logits.device, "target", ~known.all())
    used = inverse_temperature[rows] if inverse_temperature.dim() else inverse_temperature
    note_on_device(logits.device, "setting", ~((used > 0) & torch.isfinite(used)).all())
    return found._replace(logprobs=torch.where(known, found.logprobs, float("nan")))


def write_row_gradient(
    logits: Tensor,
    out: Tensor,
    targets: Tensor,
    rows: Tensor,
    inverse_temperature: Tensor,
    statistics: RowStatistics,
    g_l: Tensor,
    g_h: Tensor,
    shard: Shard,
) -> None:
    """(1/T)·[g_l·∂l/∂z + g_h·∂H/∂z] → `out` [N, V/TP], which may be the logits; zeros in all other rows and beyond the
    vocabulary. g_l, g_h are [N]."""
    valid = shard.valid
    entropy_pulls = g_h.device.type != "cpu" or bool(g_h.any())  # a GPU is not asked: it would have to be waited for
    for positions, chunk in _row_chunks(rows, logits.shape[0], valid):
        logp = _scaled(logits, chunk, inverse_temperature, shard) - statistics.maximum[positions, None]
        logp -= statistics.log_sum[positions, None]
        scale_N = inverse_temperature if inverse_temperature.dim() == 0 else inverse_temperature[chunk]
        l_N1, h_N1 = (g_l[chunk] * scale_N)[:, None], (g_h[chunk] * scale_N)[:, None]
        if entropy_pulls:
            p = logp.exp()
            # p·log p is 0 where p is 0, also where log p is −inf
            logp.clamp_(min=LOWEST).add_(statistics.entropy[positions, None])
            gradient = logp.mul_(p).mul_(-h_N1).addcmul_(p, l_N1, value=-1)
        else:
            gradient = logp.exp_().mul_(-l_N1)
        local = targets[chunk] - shard.first
        owned = ((local >= 0) & (local < valid)).nonzero().squeeze(1)
        gradient[owned, local[owned]] += l_N1[owned, 0]
        out[chunk, :valid] = gradient.to(out.dtype)
    if rows.numel() < logits.shape[0]:
        skipped = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device).index_fill_(0, rows, False)
        out[skipped] = 0
    out[:, valid:] = 0


def _row_chunks(rows: Tensor, count: int, columns: int) -> Iterator[tuple[slice, slice | Tensor]]:
    """(positions among the rows asked for, row numbers): slices, which copy nothing, where these are all `count`."""
    size = max(1, (CHUNK_ELEMENTS if rows.device.type != "cpu" else CPU_CHUNK_ELEMENTS) // max(1, columns))
    for start in range(0, rows.numel(), size):
        positions = slice(start, min(start + size, rows.numel()))
        yield positions, positions if rows.numel() == count else rows[positions]


def _scaled(logits: Tensor, rows: slice | Tensor, inverse_temperature: Tensor, shard: Shard) -> Tensor:
    """z = logits / T of the given rows and the valid columns, in the compute dtype; maybe a view of the logits."""
    z = logits[rows, : shard.valid].to(inverse_temperature.dtype)
    if z.device.type == "cpu" and inverse_temperature.dim() == 0 and float(inverse_temperature) == 1:
        return z
    return z * (inverse_temperature if inverse_temperature.dim() == 0 else inverse_temperature[rows, None])


class _RowLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, rows, inverse_temperature, shard, group, in_place):
        found = row_statistics(logits, targets, rows, inverse_temperature, shard, group)
        ctx.save_for_backward(logits, targets, rows, inverse_temperature, *found)
        ctx.shard, ctx.in_place = shard, in_place
        logprobs = found.logprobs.new_zeros(logits.shape[0]).index_copy_(0, rows, found.logprobs)
        entropy = found.entropy.new_zeros(logits.shape[0]).index_copy_(0, rows, found.entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, g_l, g_h):
        refuse_second_derivative()
        logits, targets, rows, inverse_temperature, *found = ctx.saved_tensors
        out = logits if ctx.in_place else torch.empty_like(logits)
        write_row_gradient(logits, out, targets, rows, inverse_temperature, RowStatistics(*found), g_l, g_h, ctx.shard)
        return out, None, None, None, None, None, None


def _local_statistics(z_NV: Tensor, local_targets_N: Tensor) -> Tensor:
    """[n, 4]: max, Σ exp(z − max), z of the target (−inf where another rank owns it), Σ exp(z − max)·(z − max)."""
    rows, columns = z_NV.shape
    if columns == 0:
        nothing = z_NV.new_full((rows, 4), 0.0)
        nothing[:, 0] = nothing[:, 2] = float("-inf")
        return nothing
    owned = (local_targets_N >= 0) & (local_targets_N < columns)
    target = z_NV.gather(1, local_targets_N.clamp(0, columns - 1)[:, None]).squeeze(1)
    target = torch.where(owned, target, float("-inf"))
    maximum = z_NV.amax(dim=1)
    shifted = z_NV - torch.where(maximum == float("-inf"), 0.0, maximum)[:, None]
    exponential = shifted.exp()
    weighted = shifted.clamp_(min=LOWEST).mul_(exponential).sum(dim=1)  # 0 · −inf must be 0
    return torch.stack([maximum, exponential.sum(dim=1), target, weighted], dim=1)


def _combine(statistics_N4: Tensor, group: dist.ProcessGroup | None) -> RowStatistics:
    """Whole-row (M, log S, l, H) from every rank's part: the one collective of the forward pass."""
    if group is None:
        parts_RN4 = statistics_N4[None]
    else:
        parts_RN4 = statistics_N4.new_empty(group.size(), *statistics_N4.shape)
        dist.all_gather_into_tensor(parts_RN4.view(-1, 4), statistics_N4.contiguous(), group=group)
    maximum_RN, sum_RN, target_RN, weighted_RN = parts_RN4.unbind(dim=2)
    maximum = maximum_RN.amax(dim=0)
    # a rank whose columns are all −inf or padding has sum 0: its shift must not turn 0 × −inf into NaN
    shift_RN = torch.where(sum_RN > 0, maximum_RN - maximum, 0.0)
    scale_RN = shift_RN.exp()
    total = (sum_RN * scale_RN).sum(dim=0)
    weighted = ((weighted_RN + sum_RN * shift_RN) * scale_RN).sum(dim=0)
    log_sum = torch.where(torch.isfinite(maximum), total.log(), float("nan"))
    logprobs = (target_RN.amax(dim=0) - maximum) - log_sum
    entropy = log_sum - weighted / total
    return RowStatistics(maximum, log_sum, logprobs, entropy)
