"""The losses of a linear head without its logits: l, H and the clipped policy loss of z = X Wᵀ / T, where neither z nor
its gradient is ever whole.

Rows are taken in chunks (`linear_chunks`). The clipped loss computes all its gradients in the forward pass, 6·N·H·V
operations; log-probs and entropy for any other loss recompute the logits in the backward pass, 8·N·H·V; without a
gradient both cost 2·N·H·V. Sources: Liger-Kernel (arXiv 2410.10989, fused linear cross-entropy), Cut Your Losses
(2411.09009).
"""

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_kernels.arguments import (
    check_loss_on_cpu,
    check_on_cpu,
    check_rows,
    check_vectors,
    compute_dtype,
    inverse_temperature,
    kernel_temperature,
    refuse_second_derivative,
)
from dapo_kernels.device_errors import note_on_device
from dapo_kernels.kl import check_kl
from dapo_kernels.linear_chunks import (
    LinearGradients,
    LinearHead,
    among_all_rows,
    chunks,
    gathered,
    global_rows,
    linear_head,
    of_rows,
    part_of,
    weight_gradient_for_autograd,
)
from dapo_kernels.logprobs import LogprobsAndEntropy, RowStatistics, row_statistics, write_row_gradient
from dapo_kernels.policy_loss import ClippedRows, PolicyLoss, check_clip, clip_settings, loss_of_rows


def linear_clipped_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    loss_mask: Tensor,
    *,
    eps_low: float,
    eps_high: float,
    eps_dual: float | None = None,
    denominator: float | Tensor,
    temperature: float | Tensor = 1.0,
    entropy_coefficient: float = 0.0,
    reference_logprobs: Tensor | None = None,
    kl_coefficient: float = 0.0,
    kl_estimator: str = "k3",
    vocab_size: int | None = None,
    tensor_parallel_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_rows: int = 2048,
    gradient_scale: float = 1.0,
    implementation: str = "auto",
    rows: Tensor | None = None,
) -> PolicyLoss:
    """`clipped_policy_loss` of logits = hidden · weightᵀ, gradients of hidden and weight computed in the forward pass.

    Where `weight.main_grad` exists, gradient_scale · dW is accumulated into it before this returns; else dW reaches
    `weight.grad` in the backward pass as usual. Backward runs once.

    Args:
        hidden: [N, H] bf16, fp16, fp32 or fp64; with `sequence_parallel` this rank's N/TP rows of it.
        weight: [V/TP, H], same dtype.
        targets, old_logprobs, advantages, loss_mask, reference_logprobs: [N], the same on every rank of the group. Rows
            of weight 0 are dropped before the product; without `rows`, finding them is the one wait for the device.
        sequence_parallel: gather hidden's rows over the group, and scatter its gradient back.
        chunk_rows: rows of logits alive at a time; memory is chunk_rows · V/TP elements.
        gradient_scale: the factor that backward will receive (a loss scale). Only `main_grad` depends on it; another
            factor then is an error: ValueError on a CPU, a flag and NaN on a GPU.
        rows: [n] int64, the rows of weight > 0 in order, from a caller who knows them without the device. Others are an
            error: ValueError on a CPU, a flag and NaN on a GPU.
        others: as in `clipped_policy_loss`.

    Raises:
        ValueError: as `clipped_policy_loss`; hidden and weight do not fit each other; chunk_rows < 1.
    """
    check_clip(eps_low, eps_high, eps_dual)
    check_kl(kl_coefficient, kl_estimator, reference_logprobs)
    reference = {"reference_logprobs": reference_logprobs} if kl_coefficient else {}
    head = linear_head(
        hidden, weight, loss_mask > 0, rows, vocab_size=vocab_size, tensor_parallel_group=tensor_parallel_group,
        sequence_parallel=sequence_parallel, chunk_rows=chunk_rows, implementation=implementation,
    )  # fmt: skip
    count = global_rows(hidden, head.group, sequence_parallel)
    check_rows(count, hidden.device, targets, None)
    check_vectors(
        count, hidden.device, old_logprobs=old_logprobs, advantages=advantages, loss_mask=loss_mask, **reference
    )
    check_loss_on_cpu(loss_mask, denominator)
    check_on_cpu(targets, temperature, head.shard.vocabulary, loss_mask > 0)
    loss, values, clips = _LinearClippedLoss.apply(
        hidden, weight, head, (targets, old_logprobs, advantages, loss_mask, *reference.values()),
        _inverse_temperature(temperature, count, hidden, head), denominator,
        {
            "eps_low": eps_low, "eps_high": eps_high, "eps_dual": eps_dual, "entropy_coefficient": entropy_coefficient,
            "kl_coefficient": kl_coefficient, "kl_estimator": kl_estimator,
        },
        _main_grad(weight, head), gradient_scale,
    )  # fmt: skip
    return PolicyLoss(loss, *values, *clips)


def linear_logprobs_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    vocab_size: int | None = None,
    tensor_parallel_group: dist.ProcessGroup | None = None,
    sequence_parallel: bool = False,
    chunk_rows: int = 2048,
    implementation: str = "auto",
    row_mask: Tensor | None = None,
    rows: Tensor | None = None,
) -> LogprobsAndEntropy:
    """`logprobs_and_entropy` of logits = hidden · weightᵀ, differentiable in hidden and weight.

    The logits are made again in the backward pass, which adds dW to `weight.main_grad` where that exists. Arguments as
    in `linear_clipped_policy_loss` and `logprobs_and_entropy`; `rows` names the same rows as `row_mask`, or stands
    alone.

    Raises:
        ValueError: as these two.
    """
    if row_mask is not None and (row_mask.dim() != 1 or row_mask.dtype != torch.bool):
        raise ValueError(f"row_mask must be bool [N]; got {row_mask.dtype} {tuple(row_mask.shape)}")
    head = linear_head(
        hidden, weight, row_mask, rows, vocab_size=vocab_size, tensor_parallel_group=tensor_parallel_group,
        sequence_parallel=sequence_parallel, chunk_rows=chunk_rows, implementation=implementation,
    )  # fmt: skip
    count = global_rows(hidden, head.group, sequence_parallel)
    check_rows(count, hidden.device, targets, row_mask)
    scale = _inverse_temperature(temperature, count, hidden, head)
    if hidden.device.type == "cpu":
        check_on_cpu(of_rows(head, targets), of_rows(head, temperature), head.shard.vocabulary, None)
    return LogprobsAndEntropy(*_LinearLogprobs.apply(hidden, weight, head, targets, scale, _main_grad(weight, head)))


class _LinearClippedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, head: LinearHead, vectors, scale, denominator, clip, main_grad, gradient_scale):
        whole = gathered(head, hidden)
        gradients = LinearGradients(head, whole, weight, main_grad, gradient_scale)
        dtype = compute_dtype(hidden.dtype)
        chunk_loss = _triton_chunk_loss if head.implementation == "triton" else _torch_chunk_loss
        want = head.need_hidden or head.need_weight
        if isinstance(denominator, Tensor):
            denominator = denominator.to(hidden.device, dtype).reshape(())
        # once a call, not once a chunk: on a GPU each small kernel takes 2 to 4 µs between products
        own, scale = [of_rows(head, vector) for vector in vectors], of_rows(head, scale)
        found = ClippedRows.empty(head.rows.numel(), dtype, hidden.device)
        for chunk in chunks(head, whole, weight):
            part = chunk.positions
            chunk_loss(
                head, chunk.logits, [vector[part] for vector in own], part_of(scale, part),
                denominator, clip, want, found.part(part),
            )  # fmt: skip
            if want:
                gradients.add(chunk)
        gradients.finish()
        loss = found.terms.sum(dtype=torch.float64)
        values, clips = (among_all_rows(head, tensor, vectors[0].shape[0]) for tensor in found[1:])
        ctx.gradients = (gradients.hidden, None if main_grad is not None else gradients.weight)
        ctx.main_grad, ctx.gradient_scale, ctx.weight = main_grad, gradient_scale, weight
        ctx.implementation = head.implementation
        ctx.mark_non_differentiable(values, clips)
        if loss.device.type != "cpu":
            weights = vectors[3]
            sound = (weights >= 0).all() & (own[3] > 0).all() & ((weights > 0).sum() == head.rows.numel())
            if isinstance(denominator, Tensor):  # a number has been looked at
                sound &= denominator > 0
            note_on_device(loss.device, "setting", ~sound)
            loss = torch.where(sound, loss, float("nan"))
        return loss.to(dtype), values, clips

    @staticmethod
    def backward(ctx, g_loss, _values, _clips):
        refuse_second_derivative()
        if ctx.gradients is None:
            raise RuntimeError("the gradient of linear_clipped_policy_loss was already handed out: backward runs once")
        (d_hidden, d_weight), ctx.gradients = ctx.gradients, None
        if ctx.main_grad is not None:
            g_loss = _checked_factor(g_loss, ctx.gradient_scale)
        if d_hidden is not None:
            _multiply(d_hidden, g_loss, ctx.implementation)
        if d_weight is not None:
            _multiply(d_weight, g_loss, ctx.implementation)
            d_weight = d_weight.to(ctx.weight.dtype)
        elif ctx.main_grad is not None:
            d_weight = weight_gradient_for_autograd(ctx.weight)
        return d_hidden, d_weight, *[None] * 7


class _LinearLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, head: LinearHead, targets, scale, main_grad):
        whole = gathered(head, hidden)
        # l, H and what the backward pass needs of a row: maximum and sum, as the implementation has them
        shape, dtype = (head.rows.numel(),), compute_dtype(hidden.dtype)
        kept = [torch.empty(shape, dtype=dtype, device=hidden.device) for _ in range(4)]
        own_targets, own_scale = of_rows(head, targets), of_rows(head, scale)
        for chunk in chunks(head, whole, weight):
            into = [vector[chunk.positions] for vector in kept]
            own, chunk_scale = own_targets[chunk.positions], part_of(own_scale, chunk.positions)
            if head.implementation == "triton":
                from dapo_kernels import triton_rows

                triton_rows.logprobs(
                    chunk.logits, own, None, chunk_scale, head.shard, head.group, triton_rows.RowValues(*into)
                )
            else:
                every = torch.arange(own.numel(), device=own.device)
                found = row_statistics(chunk.logits, own, every, chunk_scale, head.shard, head.group)
                for vector, value in zip(
                    into, (found.logprobs, found.entropy, found.maximum, found.log_sum), strict=True
                ):
                    vector.copy_(value)
        ctx.save_for_backward(hidden, weight, own_targets, *kept)
        ctx.head, ctx.main_grad, ctx.weight, ctx.scale = head, main_grad, weight, own_scale
        return tuple(among_all_rows(head, vector, targets.shape[0]) for vector in kept[:2])

    @staticmethod
    def backward(ctx, g_l, g_h):
        refuse_second_derivative()
        hidden, weight, targets, *kept = ctx.saved_tensors
        head = ctx.head
        whole = gathered(head, hidden)
        gradients = LinearGradients(head, whole, weight, ctx.main_grad)
        g_l, g_h = of_rows(head, g_l), of_rows(head, g_h)
        for chunk in chunks(head, whole, weight):
            part = chunk.positions
            own, chunk_scale = targets[part], part_of(ctx.scale, part)
            own_l, own_h, values = g_l[part], g_h[part], [vector[part] for vector in kept]
            if head.implementation == "triton":
                from dapo_kernels import triton_rows

                triton_rows.gradient(
                    chunk.logits, chunk.logits, triton_rows.RowValues(*values), own, None, own_l, own_h, chunk_scale,
                    head.shard,
                )  # fmt: skip
            else:
                every = torch.arange(own.numel(), device=own.device)
                statistics = RowStatistics(values[2], values[3], values[0], values[1])
                write_row_gradient(
                    chunk.logits, chunk.logits, own, every, chunk_scale, statistics, own_l, own_h, head.shard
                )
            gradients.add(chunk)
        gradients.finish()
        if ctx.main_grad is not None:
            d_weight = weight_gradient_for_autograd(ctx.weight)
        else:
            d_weight = None if gradients.weight is None else gradients.weight.to(weight.dtype)
        return gradients.hidden, d_weight, *[None] * 4


def _torch_chunk_loss(head, logits, vectors, scale, denominator, clip, want, into: ClippedRows):
    """A chunk's rows `into` their place, the sum of the terms at the first one's; `logits` become their gradient where
    that is wanted."""
    targets, old, advantages, weights, *reference = vectors
    rows = torch.arange(targets.numel(), device=targets.device)
    found = row_statistics(logits, targets, rows, scale, head.shard, head.group)
    with torch.enable_grad():
        leaves = [found.logprobs.detach().requires_grad_(), found.entropy.detach().requires_grad_()]
        result = loss_of_rows(
            *leaves, old, advantages, weights, denominator=denominator,
            reference_logprobs=reference[0] if reference else None, **clip,
        )  # fmt: skip
        if want:
            g_l, g_h = torch.autograd.grad(result.loss, leaves, allow_unused=True, materialize_grads=True)
            write_row_gradient(logits, logits, targets, rows, scale, found, g_l, g_h, head.shard)
    into.terms.zero_()[0] = result.loss.detach()
    torch.stack([result.logprobs, result.ratio, result.entropy], out=into.values)
    torch.stack([result.clipped_low, result.clipped_high, result.clipped_dual], out=into.clips)


def _triton_chunk_loss(head, logits, vectors, scale, denominator, clip, want, into: ClippedRows):
    from dapo_kernels import triton_rows

    targets, old, advantages, weights, *reference = vectors
    triton_rows.clipped_loss(
        logits, logits if want else None, targets, old, advantages, weights,
        denominator, scale, head.shard, head.group, clip_settings(**clip), *(reference or [None]), into,
    )  # fmt: skip


def _inverse_temperature(temperature: float | Tensor, count: int, hidden: Tensor, head: LinearHead) -> float | Tensor:
    of_implementation = kernel_temperature if head.implementation == "triton" else inverse_temperature
    return of_implementation(temperature, count, hidden)


def _main_grad(weight: Tensor, head: LinearHead) -> Tensor | None:
    return getattr(weight, "main_grad", None) if head.need_weight else None


def _checked_factor(g_loss: Tensor, expected: float) -> Tensor:
    """The incoming factor, if main_grad was scaled by it; else it is too late to scale."""
    if g_loss.device.type == "cpu":
        if float(g_loss) != expected:
            raise ValueError(
                f"the loss is differentiated under the factor {float(g_loss)}, but gradient_scale={expected} is "
                "already in main_grad; pass the factor as gradient_scale"
            )
        return g_loss
    right = g_loss == expected
    note_on_device(g_loss.device, "gradient_scale", ~right)
    return torch.where(right, g_loss, float("nan"))


def _multiply(gradient: Tensor, factor: Tensor, implementation: str) -> None:
    if implementation == "triton" and gradient.dtype != torch.float64:
        from dapo_kernels import triton_rows

        triton_rows.scale(gradient, factor)
    elif gradient.device.type != "cpu" or float(factor) != 1:
        gradient.mul_(factor)
