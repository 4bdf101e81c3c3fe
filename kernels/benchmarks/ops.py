"""The operations to measure: each op of dapo_kernels and its peers on the same inputs, with its floor."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from dapo_kernels import (
    clipped_policy_loss,
    linear_clipped_policy_loss,
    linear_logprobs_and_entropy,
    logprobs_and_entropy,
)
from measure import Ceilings
from peers import CLIP, has_liger, liger_linear_loss, liger_loss, torch_losses
from rank import as_a_rank
from torch import Tensor

SEQUENCE_ROWS = 1024  # rows of a sequence, where there are as many
CHUNK_ROWS = inspect.signature(linear_clipped_policy_loss).parameters["chunk_rows"].default
LOSS_GAP = 2e-2  # a peer in bf16 whose loss differs by more computes something else; losses here are means of ±1


class Case(NamedTuple):
    """`operation(*prepare(i))` is one call; `floor_s` is the least time it can take on this device. `value`, where the
    operation has a loss, computes it once, to be compared with ours."""

    op: str
    implementation: str
    rows: int
    columns: int
    hidden: int
    mix: str
    prepare: Callable[[int], tuple]
    operation: Callable[..., object]
    floor_s: float
    floor: str
    value: Callable[[], float] | None = None


class Rows(NamedTuple):
    """Row vectors [N] of `sequences` sequences of one length: targets, old log-probs, advantages, weights; how many
    rows are trained, and in how many a gradient flows."""

    sequences: int
    targets: Tensor
    old: Tensor
    advantages: Tensor
    weights: Tensor
    trained: int
    live: int

    @property
    def vectors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.targets, self.old, self.advantages, self.weights


def build_rows(rows: int, columns: int, mix: str, device: torch.device, score: Callable[[Tensor], Tensor]) -> Rows:
    """ "plain": every row trained, ratios 1, nothing clipped; "real": 30 % of the rows masked and 1 % of the ratios
    beyond the clip range. Advantages are 1 or −1 a sequence. `score`: targets → log-probs."""
    sequences = max(1, rows // SEQUENCE_ROWS)
    targets = torch.randint(0, columns, (rows,), device=device)
    signs = torch.arange(sequences, device=device) % 2 * -2.0 + 1.0
    advantages = signs.repeat_interleave(rows // sequences)
    real = mix == "real"
    weights = (torch.rand(rows, device=device) >= (0.3 if real else 0.0)).float()
    far = torch.rand(rows, device=device) < (0.01 if real else 0.0)
    # e^±1 on the side that is clipped
    old = score(targets).float() - torch.where(far, advantages, 0.0)
    trained = int(weights.sum())
    return Rows(sequences, targets, old, advantages, weights, trained, int((weights * ~far).sum()))


def own_implementation(device: torch.device) -> str:
    """Triton on a GPU and in the interpreter, torch elsewhere."""
    if device.type == "cuda":
        return "triton"
    try:
        from dapo_kernels.triton_rows import INTERPRETED
    except ImportError:
        return "torch"
    return "triton" if INTERPRETED else "torch"


def materialised(
    rows: int, columns: int, mix: str, dtype: torch.dtype, device: torch.device, limits: Ceilings
) -> Iterator[Case]:
    """Cases on logits [rows, columns]."""
    own = own_implementation(device)
    source = torch.randn(rows, columns, device=device, dtype=dtype).mul_(2)
    batch = build_rows(
        rows, columns, mix, device, lambda y: logprobs_and_entropy(source, y, implementation=own).logprobs
    )
    # the work space, with room for the unused last row of each of Liger's sequences
    liger = has_liger() and own == "triton"
    space = source.new_empty((rows + batch.sequences) if liger else rows, columns)
    logits = space[:rows]
    denominator = float(batch.trained)
    row_s = columns * source.element_size() / limits.copy_bytes_per_s
    loss_floor, read_floor = (batch.trained + batch.live + rows) * row_s, batch.trained * row_s

    def prepare(_: int) -> tuple:
        return (logits.detach().copy_(source).requires_grad_(),)

    def prepare_liger(_: int) -> tuple:
        whole = space.view(batch.sequences, -1, columns)
        whole[:, :-1].copy_(source.view(batch.sequences, -1, columns))
        whole[:, -1] = source[0]
        return (whole.detach().requires_grad_(),)

    def loss_case(name: str, loss: Callable[[Tensor], Tensor], ready: Callable[[int], tuple] = prepare) -> Case:
        return Case(
            "clipped loss + gradient", name, rows, columns, 0, mix, ready,
            lambda z: torch.autograd.grad(loss(z), z), loss_floor, "2 reads + 1 write",
            lambda: float(loss(*ready(0)).detach()),
        )  # fmt: skip

    asked = batch.weights > 0

    def forward(z: Tensor) -> None:
        with torch.no_grad(), as_a_rank(columns):
            logprobs_and_entropy(z, batch.targets, row_mask=asked, implementation=own)

    def ours(z: Tensor) -> Tensor:
        with as_a_rank(columns):
            return clipped_policy_loss(z, *batch.vectors, implementation=own, denominator=denominator, **CLIP).loss

    yield loss_case(own, ours)
    yield Case("log-probs", own, rows, columns, 0, mix, prepare, forward, read_floor, "1 read")
    for name, step in torch_losses(device, columns).items():
        yield loss_case(name, lambda z, step=step: step(z, *batch.vectors, denominator))
    if liger:
        yield loss_case("liger", lambda z: liger_loss(z, *batch.vectors), prepare_liger)


def other_chunks(rows: int, sizes: Iterable[int]) -> list[int]:
    """The chunk sizes that cut `rows` rows in another way than the op's own, and than each other."""
    cuts = {min(CHUNK_ROWS, rows)}
    return [size for size in sizes if (cut := min(size, rows)) not in cuts and not cuts.add(cut)]


def fused_linear(
    rows: int,
    columns: int,
    width: int,
    mix: str,
    dtype: torch.dtype,
    device: torch.device,
    limits: Ceilings,
    chunk_sizes: Iterable[int] = (),
) -> Iterator[Case]:
    """Cases on hidden states [rows, width] and a weight [columns, width]; our loss at the op's own rows a chunk, and
    named for it at each of `chunk_sizes` that differs."""
    own = own_implementation(device)
    hidden = torch.randn(rows, width, device=device, dtype=dtype)
    weight = torch.nn.Parameter(torch.randn(columns, width, device=device, dtype=dtype) / width**0.5)
    batch = build_rows(
        rows, columns, mix, device,
        lambda y: linear_logprobs_and_entropy(hidden, weight.detach(), y, implementation=own).logprobs,
    )  # fmt: skip
    denominator = float(batch.trained)
    work = batch.trained * width * columns / limits.matmul_flop_per_s

    def prepare(_: int) -> tuple:
        return (hidden.detach().requires_grad_(),)

    def loss_case(name: str, loss: Callable[[Tensor], Tensor], leaves: Callable[[Tensor], list[Tensor]]) -> Case:
        return Case(
            "linear loss + gradients", name, rows, columns, width, mix, prepare,
            lambda x: torch.autograd.grad(loss(x), leaves(x)), 6 * work, "6NHV",
            lambda: float(loss(*prepare(0)).detach()),
        )  # fmt: skip

    def forward(x: Tensor) -> None:
        with torch.no_grad(), as_a_rank(columns):
            linear_logprobs_and_entropy(x, weight, batch.targets, row_mask=batch.weights > 0, implementation=own)

    def ours(x: Tensor, chunk_rows: int = CHUNK_ROWS) -> Tensor:
        with as_a_rank(columns):
            return linear_clipped_policy_loss(
                x, weight, *batch.vectors, implementation=own, denominator=denominator, chunk_rows=chunk_rows, **CLIP
            ).loss

    weight.main_grad = torch.zeros(columns, width, device=device)  # where Megatron's learner collects dW
    yield loss_case(own, ours, lambda x: [x])
    for size in other_chunks(batch.trained, chunk_sizes):
        yield loss_case(f"{own}, chunk {size}", partial(ours, chunk_rows=size), lambda x: [x])
    yield Case("linear log-probs", own, rows, columns, width, mix, prepare, forward, 2 * work, "2NHV")
    del weight.main_grad
    both = lambda x: [x, weight]  # noqa: E731
    for name, step in torch_losses(device, columns).items():
        yield loss_case(name, lambda x, step=step: step(x @ weight.t(), *batch.vectors, denominator), both)
    if has_liger():
        for chunk in (1, 8) if batch.sequences >= 8 else (1,):
            peer = liger_linear_loss(chunk, compiled=device.type == "cuda")
            yield loss_case(
                f"liger, chunk {chunk}", lambda x, peer=peer: peer(x, weight, *batch.vectors, batch.sequences), both
            )
