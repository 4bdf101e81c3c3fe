"""The row kernels as autograd functions. The clipped loss writes its gradient in the forward pass: its coefficient is
known there, and the backward pass only multiplies, where the incoming factor is not 1."""

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_kernels import triton_rows
from dapo_kernels.arguments import Shard, refuse_second_derivative
from dapo_kernels.triton_rows import ClipSettings


class TritonLogprobs(torch.autograd.Function):
    """(l, H), fp32 [N]; the gradient is computed in the backward pass, in place if so asked."""

    @staticmethod
    def forward(ctx, logits, targets, mask, inverse_temperature, shard: Shard, group: dist.ProcessGroup, in_place):
        rows = triton_rows.logprobs(logits, targets, mask, inverse_temperature, shard, group)
        ctx.save_for_backward(logits, targets, mask, *rows)
        ctx.inverse_temperature, ctx.shard, ctx.in_place = inverse_temperature, shard, in_place
        return rows.logprobs, rows.entropy

    @staticmethod
    def backward(ctx, g_l: Tensor, g_h: Tensor):
        refuse_second_derivative()
        logits, targets, mask, *rows = ctx.saved_tensors
        out = logits if ctx.in_place else torch.empty_like(logits)
        triton_rows.gradient(
            logits, out, triton_rows.RowValues(*rows), targets, mask, g_l, g_h, ctx.inverse_temperature, ctx.shard
        )
        if ctx.in_place:
            torch.autograd.graph.increment_version(logits)  # whoever still needs the logits shall hear of it
        return out, None, None, None, None, None, None


class TritonClippedLoss(torch.autograd.Function):
    """(loss, (l, ratio, H) [3, N], clips [3, N]); with `want_gradient` the logits' memory, or a new one, holds the
    gradient when forward returns."""

    @staticmethod
    def forward(
        ctx, logits, targets, old_logprobs, advantages, weights, reference_logprobs, denominator, inverse_temperature,
        shard: Shard, group: dist.ProcessGroup, settings: ClipSettings, want_gradient: bool, in_place: bool,
    ):  # fmt: skip
        out = None if not want_gradient else logits if in_place else torch.empty_like(logits)
        rows = triton_rows.clipped_loss(
            logits, out, targets, old_logprobs, advantages, weights, denominator, inverse_temperature, shard, group,
            settings, reference_logprobs,
        )  # fmt: skip
        if out is logits:
            torch.autograd.graph.increment_version(logits)
        ctx.gradient, ctx.version = out, None if out is None else out._version
        ctx.mark_non_differentiable(rows.values, rows.clips)
        return rows.terms.sum(dtype=torch.float64).float(), rows.values, rows.clips

    @staticmethod
    def backward(ctx, g_loss: Tensor, _values, _clips):
        refuse_second_derivative()
        if ctx.gradient is None:
            raise RuntimeError("the gradient of clipped_policy_loss was already handed out: backward runs once")
        gradient, ctx.gradient = ctx.gradient, None
        if gradient._version != ctx.version:
            raise RuntimeError(
                "the logits' memory, which held the gradient of clipped_policy_loss, was written before backward; "
                "pass in_place=False to use the logits again"
            )
        triton_rows.scale(gradient, g_loss)
        return gradient, *[None] * 12
