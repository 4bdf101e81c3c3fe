"""Chunks of a linear head: what the fused linear ops share.

logits = X Wᵀ are made for a chunk of rows at a time in one buffer, overwritten by their own gradient dZ, and become

    dX = dZ W  (summed over the tensor-parallel ranks once)          dW += dZᵀ X  (fp32, in the product's epilogue)

before the next chunk. Rows that do not count never reach a product.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from dapo_kernels.arguments import Shard, choose_implementation, compute_dtype, group_of_many, shard_of


@dataclass(frozen=True)
class LinearHead:
    """How hidden states become rows of logits on this rank.

    `rows` [n] are the rows that count, in order; `everything` says that they are all of them.
    """

    rows: Tensor
    everything: bool
    shard: Shard
    group: dist.ProcessGroup | None
    sequence_parallel: bool
    chunk_rows: int
    implementation: str
    need_hidden: bool
    need_weight: bool


def linear_head(
    hidden: Tensor,
    weight: Tensor,
    counts: Tensor | None,
    given_rows: Tensor | None,
    *,
    vocab_size: int | None,
    tensor_parallel_group: dist.ProcessGroup | None,
    sequence_parallel: bool,
    chunk_rows: int,
    implementation: str,
) -> LinearHead:
    """Check the shapes and choose the rows: `given_rows` if the caller knows them, else those where `counts` [N] bool
    is true (to count them is to wait for the device), or all.

    Raises:
        ValueError: hidden or weight are not contiguous matrices of one dtype and width, chunk_rows < 1, or given_rows
            is no int64 vector on their device; on a CPU also if these are not the rows of `counts`.
    """
    for name, value in (("hidden", hidden), ("weight", weight)):
        if value.dim() != 2 or not value.is_contiguous():
            raise ValueError(f"{name} must be a contiguous matrix; got {tuple(value.shape)}, strides {value.stride()}")
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden has {hidden.shape[1]} columns, weight has {weight.shape[1]}: both must be H")
    if hidden.dtype != weight.dtype or hidden.device != weight.device:
        raise ValueError(
            f"hidden is {hidden.dtype} on {hidden.device}, weight is {weight.dtype} on {weight.device}: make them equal"
        )
    if hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"hidden must be bf16, fp16, fp32 or fp64; got {hidden.dtype}")
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows={chunk_rows} must be >= 1")
    group = group_of_many(tensor_parallel_group)
    count = global_rows(hidden, group, sequence_parallel)
    if given_rows is not None:
        rows = _checked_rows(given_rows, counts, count, hidden.device)
    else:
        rows = torch.arange(count, device=hidden.device) if counts is None else counts.nonzero().squeeze(1)
    grad = torch.is_grad_enabled()
    return LinearHead(
        rows,
        rows.numel() == count,
        shard_of(weight.shape[0], vocab_size, tensor_parallel_group),
        group,
        sequence_parallel and group is not None,
        chunk_rows,
        choose_implementation(implementation, hidden.device, hidden.dtype),
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
    )


def _checked_rows(rows: Tensor, counts: Tensor | None, count: int, device: torch.device) -> Tensor:
    if rows.dim() != 1 or rows.dtype != torch.int64 or rows.numel() > count:
        raise ValueError(f"rows must be int64 [n], n <= {count}; got {rows.dtype} {tuple(rows.shape)}")
    if rows.device != device:
        raise ValueError(f"rows is on {rows.device}, hidden is on {device}")
    if device.type == "cpu" and rows.numel():
        if int(rows.min()) < 0 or int(rows.max()) >= count or bool((rows.diff() <= 0).any()):
            raise ValueError(f"rows must increase within 0..{count - 1}")
        if counts is not None and not (int(counts.sum()) == rows.numel() and bool(counts[rows].all())):
            raise ValueError(f"rows names {rows.numel()} rows, not the {int(counts.sum())} with a weight above 0")
    return rows


def global_rows(hidden: Tensor, group: dist.ProcessGroup | None, sequence_parallel: bool) -> int:
    """N: rows of all ranks where each holds a slice of the sequence."""
    return hidden.shape[0] * (group.size() if group is not None and sequence_parallel else 1)


def gathered(head: LinearHead, hidden: Tensor) -> Tensor:
    """[N, H]: the slices of all ranks under sequence parallelism, else `hidden` itself."""
    if not head.sequence_parallel:
        return hidden
    whole = hidden.new_empty(global_rows(hidden, head.group, True), hidden.shape[1])
    dist.all_gather_into_tensor(whole, hidden, group=head.group)
    return whole


def of_rows(head: LinearHead, per_row: float | Tensor) -> float | Tensor:
    """The entries, [N] → [n], of the rows that count; a number stays one."""
    if not isinstance(per_row, Tensor) or per_row.dim() == 0:
        return per_row
    return per_row.contiguous() if head.everything else per_row.index_select(0, head.rows)


def part_of(per_row: float | Tensor, positions: slice) -> float | Tensor:
    """The entries of a chunk; a number stays one."""
    return per_row[positions] if isinstance(per_row, Tensor) and per_row.dim() else per_row


def among_all_rows(head: LinearHead, per_row: Tensor, count: int) -> Tensor:
    """[…, n] of the rows that count → […, count], zeros elsewhere; `per_row` itself where these are all."""
    if head.everything:
        return per_row
    return per_row.new_zeros(*per_row.shape[:-1], count).index_copy_(-1, head.rows, per_row)


@dataclass(frozen=True)
class Chunk:
    """`logits` [m, V/TP] and `hidden` [m, H] of the rows `rows` [m] of the batch; `positions` among the rows that
    count; `last` of all."""

    logits: Tensor
    hidden: Tensor
    rows: Tensor
    positions: slice
    last: bool


def chunks(head: LinearHead, hidden_NH: Tensor, weight: Tensor) -> Iterator[Chunk]:
    """Each chunk's logits and gathered rows, all in the same buffers: use one before asking for the next."""
    count = head.rows.numel()
    most = min(head.chunk_rows, count)
    logits = hidden_NH.new_empty(most, weight.shape[0])
    gathered_rows = None if head.everything else hidden_NH.new_empty(most, hidden_NH.shape[1])
    for start in range(0, count, head.chunk_rows):
        positions = slice(start, min(start + head.chunk_rows, count))
        rows = head.rows[positions]
        size = rows.numel()
        if gathered_rows is None:
            hidden = hidden_NH[positions]
        else:
            hidden = torch.index_select(hidden_NH, 0, rows, out=gathered_rows[:size])
        torch.mm(hidden, weight.t(), out=logits[:size])
        yield Chunk(logits[:size], hidden, rows, positions, positions.stop == count)


class LinearGradients:
    """Takes the dZ of each chunk; holds dX (reduced over the ranks with the last chunk) and dW.

    Args:
        main_grad: [V/TP, H] to accumulate factor · dW into; None: dW is kept here in fp32 (fp64 for fp64).
    """

    def __init__(
        self, head: LinearHead, hidden_NH: Tensor, weight: Tensor, main_grad: Tensor | None, factor: float = 1.0
    ) -> None:
        self._head, self._states, self._weight, self._factor = head, hidden_NH, weight, factor
        self.hidden: Tensor | None = None
        if head.need_hidden:
            self.hidden = torch.empty_like(hidden_NH) if head.everything else torch.zeros_like(hidden_NH)
        self.weight: Tensor | None = main_grad
        if main_grad is None and head.need_weight:
            self.weight = torch.zeros(weight.shape, dtype=compute_dtype(weight.dtype), device=weight.device)
        self._reduction: dist.Work | None = None
        if head.rows.numel() == 0 and self.hidden is not None:
            self._start_reduction()

    def add(self, chunk: Chunk) -> None:
        """chunk.logits must hold dZ; chunk.hidden is overwritten where rows were dropped. The reduction of dX over the
        ranks runs beside the last product for dW."""
        if self.hidden is not None:
            if self._head.everything:
                torch.mm(chunk.logits, self._weight, out=self.hidden[chunk.positions])
            else:
                # dX takes the place of the gathered rows, which are gathered again for dW: memory for a little traffic
                self.hidden.index_copy_(0, chunk.rows, torch.mm(chunk.logits, self._weight, out=chunk.hidden))
            if chunk.last:
                self._start_reduction()
        if self._head.need_weight:
            if self.hidden is not None and not self._head.everything:
                torch.index_select(self._states, 0, chunk.rows, out=chunk.hidden)
            accumulate_product(self.weight, chunk.logits, chunk.hidden, self._factor)

    def finish(self) -> None:
        """Wait for the reduction."""
        if self._reduction is not None:
            self._reduction.wait()

    def _start_reduction(self) -> None:
        group = self._head.group
        if group is None:
            return
        if not self._head.sequence_parallel:
            self._reduction = dist.all_reduce(self.hidden, group=group, async_op=True)
            return
        whole = self.hidden
        self.hidden = whole.new_empty(whole.shape[0] // group.size(), whole.shape[1])
        self._whole = whole  # alive until the reduction is done
        self._reduction = dist.reduce_scatter_tensor(self.hidden, whole, group=group, async_op=True)


def accumulate_product(total: Tensor, dz: Tensor, hidden: Tensor, factor: float = 1.0) -> None:
    """total [V/TP, H] += factor · dzᵀ hidden; a lower precision is widened within the product where the device can."""
    if total.dtype == dz.dtype:
        total.addmm_(dz.t(), hidden, alpha=factor)
    elif dz.device.type != "cpu" and total.dtype == torch.float32:
        torch.addmm(total, dz.t(), hidden, alpha=factor, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(dz.t().to(total.dtype), hidden.to(total.dtype), alpha=factor)


def weight_gradient_for_autograd(weight: Tensor) -> Tensor | None:
    """What autograd is handed after dW went into weight.main_grad.

    Megatron's data-parallel wrapper learns from a gradient hook that a weight is ready, so the hook must run though
    nothing is left to add: `grad_added_to_main_grad` tells it so. A tied weight (`zero_out_wgrad`) gets true zeros,
    since autograd adds them to the embedding's gradient; any other gets a view of main_grad's own memory, whose values
    nobody reads, and so costs nothing. Without such a wrapper there is no hook: None.
    """
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    main_grad = weight.main_grad
    if getattr(weight, "zero_out_wgrad", False):
        return torch.zeros_like(weight)
    if main_grad.is_contiguous() and main_grad.element_size() >= weight.element_size():
        flat = main_grad.view(-1).view(weight.dtype)
        return flat[: weight.numel()].view(weight.shape)
    return torch.empty_like(weight)
