"""Log-probability of the target and entropy of each row of vocab-parallel logits.

With z = logits / T, the maximum M and the sum S of exp(z − M) taken over the whole vocabulary, per row:

    l = (z_y − M) − log S                          H = log S − Σ_j p_j (z_j − M),   p_j = exp(z_j − M) / S
    ∂l/∂z_j = 1[j = y] − p_j                       ∂H/∂z_j = −p_j (log p_j + H)

Rank r of the tensor-parallel group holds the global columns [r·V_local, (r+1)·V_local). One all-gather of four numbers
a row (max, Σ exp, target logit, Σ exp·(z − max)) makes the row statistics whole; the backward pass communicates
nothing.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK_ELEMENTS = 1 << 22  # elements upcast at a time: bounds the extra memory to a few tens of MiB whatever N


class LogprobsAndEntropy(NamedTuple):
    """Per row, fp32 (fp64 for fp64 logits), differentiable; 0 on rows that were not asked for."""

    logprobs: Tensor
    entropy: Tensor


class _Shard(NamedTuple):
    """Which global columns this rank holds: `first` is the global id of column 0, `valid` columns are inside the
    vocabulary."""

    first: int
    valid: int


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
        implementation: "auto" or "torch".
        row_mask: [N] bool; other rows are skipped, return 0 and get gradient 0. None: every row.

    Raises:
        ValueError: shapes, dtypes or T disagree; on a CPU also a target outside the vocabulary, a NaN, or T ≤ 0
            in a tensor, in a row asked for.
    """
    if implementation not in ("auto", "torch"):
        raise ValueError(f"implementation={implementation!r} is not known; use 'auto' or 'torch'")
    _check(logits, targets, temperature, row_mask)
    group_size = 1 if tensor_parallel_group is None else tensor_parallel_group.size()
    group_rank = 0 if tensor_parallel_group is None else tensor_parallel_group.rank()
    first = group_rank * logits.shape[1]
    vocabulary = group_size * logits.shape[1] if vocab_size is None else vocab_size
    if not 0 < vocabulary <= group_size * logits.shape[1]:
        raise ValueError(
            f"vocab_size={vocab_size} must lie in 1..{group_size * logits.shape[1]}, the columns of all ranks"
        )
    shard = _Shard(first, max(0, min(logits.shape[1], vocabulary - first)))
    asked_for = torch.ones_like(targets, dtype=torch.bool) if row_mask is None else row_mask
    rows = asked_for.nonzero().squeeze(1)
    if logits.device.type == "cpu":
        asked = targets[rows]
        if asked.numel() and (int(asked.min()) < 0 or int(asked.max()) >= vocabulary):
            raise ValueError(f"targets must lie in 0..{vocabulary - 1}; found {int(asked.min())}..{int(asked.max())}")
        used = temperature[rows] if isinstance(temperature, Tensor) and temperature.dim() else temperature
        if not bool(torch.as_tensor(used > 0).all()):
            raise ValueError("temperature must be > 0 in every row asked for")
    inverse_temperature = torch.as_tensor(temperature, device=logits.device, dtype=_compute_dtype(logits)).reciprocal()
    group = tensor_parallel_group if group_size > 1 else None
    return LogprobsAndEntropy(*_RowLogprobs.apply(logits, targets, rows, inverse_temperature, shard, group, in_place))


def _check(logits: Tensor, targets: Tensor, temperature: float | Tensor, row_mask: Tensor | None) -> None:
    if logits.dim() != 2 or not logits.is_contiguous():
        raise ValueError(f"logits must be contiguous [N, V/TP]; got {tuple(logits.shape)}, strides {logits.stride()}")
    if logits.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"logits must be bf16, fp16, fp32 or fp64; got {logits.dtype}")
    if targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64 [{logits.shape[0]}]; got {targets.dtype} {tuple(targets.shape)}")
    if row_mask is not None and (row_mask.shape != logits.shape[:1] or row_mask.dtype != torch.bool):
        raise ValueError(f"row_mask must be bool [{logits.shape[0]}]; got {row_mask.dtype} {tuple(row_mask.shape)}")
    if isinstance(temperature, Tensor) and temperature.dim() not in (0, 1):
        raise ValueError(f"temperature must be a number or one a row; got shape {tuple(temperature.shape)}")
    if isinstance(temperature, Tensor) and temperature.dim() == 1 and temperature.shape != logits.shape[:1]:
        raise ValueError(f"temperature has {temperature.shape[0]} entries for {logits.shape[0]} rows")
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"temperature={temperature} must be > 0")


def _compute_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _row_chunks(rows: Tensor, columns: int) -> tuple[Tensor, ...]:
    return rows.split(max(1, CHUNK_ELEMENTS // max(1, columns)))


def _scaled(logits: Tensor, rows: Tensor, inverse_temperature: Tensor, shard: _Shard) -> Tensor:
    """z = logits / T of the given rows and the valid columns, in the compute dtype."""
    z = logits[rows, : shard.valid].to(inverse_temperature.dtype)
    scale = inverse_temperature if inverse_temperature.dim() == 0 else inverse_temperature[rows, None]
    return z.mul_(scale)


class _RowLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, rows, inverse_temperature, shard, group, in_place):
        statistics = torch.cat(
            [
                _local_statistics(_scaled(logits, chunk, inverse_temperature, shard), targets[chunk] - shard.first)
                for chunk in _row_chunks(rows, shard.valid)
            ]
            or [torch.empty(0, 4, dtype=inverse_temperature.dtype, device=logits.device)]
        )
        maximum, log_sum, logprobs_rows, entropy_rows = _combine(statistics, group)
        if logits.device.type == "cpu" and not bool(torch.isfinite(log_sum).all()):
            bad = rows[~torch.isfinite(log_sum)][0].item()
            raise ValueError(f"logits row {bad} holds a NaN, a +inf or nothing but −inf")
        ctx.save_for_backward(logits, targets, rows, inverse_temperature, maximum, log_sum, entropy_rows)
        ctx.shard, ctx.in_place = shard, in_place
        logprobs = logprobs_rows.new_zeros(logits.shape[0]).index_copy_(0, rows, logprobs_rows)
        entropy = entropy_rows.new_zeros(logits.shape[0]).index_copy_(0, rows, entropy_rows)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        logits, targets, rows, inverse_temperature, maximum, log_sum, entropy = ctx.saved_tensors
        shard, valid = ctx.shard, ctx.shard.valid
        chunks = []
        for positions in _row_chunks(torch.arange(rows.numel(), device=rows.device), valid):
            chunk = rows[positions]
            logp = _scaled(logits, chunk, inverse_temperature, shard)
            logp -= maximum[positions, None]
            logp -= log_sum[positions, None]
            p = logp.exp()
            g_l, g_h = grad_logprobs[chunk, None], grad_entropy[chunk, None]
            # p·log p is 0 where p is 0, also where log p is −inf
            gradient = -p * (g_l + g_h * (torch.where(p > 0, logp, 0.0) + entropy[positions, None]))
            local = targets[chunk] - shard.first
            owned = ((local >= 0) & (local < valid)).nonzero().squeeze(1)
            gradient[owned, local[owned]] += g_l[owned, 0]
            gradient *= inverse_temperature if inverse_temperature.dim() == 0 else inverse_temperature[chunk, None]
            if ctx.in_place:
                logits[chunk, :valid] = gradient.to(logits.dtype)
            else:
                chunks.append(gradient.to(logits.dtype))
        if ctx.in_place:
            skipped = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device).index_fill_(0, rows, False)
            logits[skipped] = 0
            logits[:, valid:] = 0
            return logits, None, None, None, None, None, None
        result = torch.zeros_like(logits)
        if chunks:
            result[rows, :valid] = torch.cat(chunks)
        return result, None, None, None, None, None, None


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
    shifted = z_NV.sub_(torch.where(maximum == float("-inf"), 0.0, maximum)[:, None])
    exponential = shifted.exp()
    weighted = torch.where(exponential > 0, shifted, 0.0).mul_(exponential).sum(dim=1)
    return torch.stack([maximum, exponential.sum(dim=1), target, weighted], dim=1)


def _combine(statistics_N4: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    return maximum, log_sum, logprobs, entropy
