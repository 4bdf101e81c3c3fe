"""The operations to measure: each op of dapo_kernels and the same formula in plain torch, with its floor."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from dapo_kernels import (
    clipped_policy_loss,
    linear_clipped_policy_loss,
    linear_logprobs_and_entropy,
    logprobs_and_entropy,
)
from measure import Ceilings
from torch import Tensor

CLIP = {"eps_low": 0.2, "eps_high": 0.28, "eps_dual": 10.0}


class Case(NamedTuple):
    """`operation(*prepare(i))` is one call; `floor_s` is the least time it can take on this device."""

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


def row_vectors(rows: int, columns: int, mix: str, device: torch.device) -> list[Tensor]:
    """targets, old log-probs, advantages, weights. "plain": every row trained, nothing clipped; "real": 30 % of the
    rows masked and 1 % of ratios beyond the clip range. Old log-probs are set by `settle_old`."""
    targets = torch.randint(0, columns, (rows,), device=device)
    advantages = torch.where(torch.rand(rows, device=device) > 0.5, 1.0, -1.0)
    weights = torch.ones(rows, device=device)
    if mix == "real":
        weights[torch.rand(rows, device=device) < 0.3] = 0.0
    return [targets, torch.zeros(rows, device=device), advantages, weights]


def settle_old(vectors: list[Tensor], logprobs: Tensor, mix: str) -> None:
    """Ratios of 1, or in the "real" mix e^±1 for one row in a hundred."""
    far = (torch.rand_like(logprobs) < 0.01) & (mix == "real")
    vectors[1] = logprobs - torch.where(far, vectors[2], torch.zeros_like(logprobs))


def materialised(rows: int, columns: int, mix: str, dtype: torch.dtype, device: torch.device, limits: Ceilings):
    """Cases on logits [rows, columns]."""
    matrix_bytes = rows * columns * torch.empty((), dtype=dtype).element_size()
    vectors = row_vectors(rows, columns, mix, device)
    # two sets in turn: neither is in the caches when its turn comes
    sources = [torch.randn(rows, columns, device=device, dtype=dtype) * 2 for _ in range(2)]
    logprobs = logprobs_and_entropy(sources[0], vectors[0]).logprobs
    settle_old(vectors, logprobs, mix)
    sources[1] = sources[0].clone()
    logits = torch.empty_like(sources[0])
    options = CLIP | {"denominator": float(vectors[3].sum())}

    def prepare(i: int) -> tuple:
        return (logits.detach().copy_(sources[i % 2]).requires_grad_(),)

    def ours(implementation: str):
        def step(z: Tensor) -> None:
            clipped_policy_loss(z, *vectors, implementation=implementation, **options).loss.backward()

        return step

    def forward(implementation: str):
        def step(z: Tensor) -> None:
            with torch.no_grad():
                logprobs_and_entropy(z, vectors[0], row_mask=vectors[3] > 0, implementation=implementation)

        return step

    peers = {name: step for name, step in _eager_steps(device).items()}
    own = ["triton"] if device.type == "cuda" else ["torch"]
    for name in own:
        yield Case("clipped loss + gradient", name, rows, columns, 0, mix, prepare, ours(name),
                   3 * matrix_bytes / limits.copy_bytes_per_s, "2 reads + 1 write")  # fmt: skip
        yield Case("log-probs", name, rows, columns, 0, mix, prepare, forward(name),
                   matrix_bytes / limits.copy_bytes_per_s, "1 read")  # fmt: skip
    for name, step in peers.items():
        yield Case("clipped loss + gradient", name, rows, columns, 0, mix, prepare,
                   lambda z, step=step: step(z, *vectors, options["denominator"]).backward(),
                   3 * matrix_bytes / limits.copy_bytes_per_s, "2 reads + 1 write")  # fmt: skip


def fused_linear(
    rows: int, columns: int, width: int, mix: str, dtype: torch.dtype, device: torch.device, limits: Ceilings
) -> Iterator[Case]:
    """Cases on hidden states [rows, width] and a weight [columns, width]."""
    vectors = row_vectors(rows, columns, mix, device)
    hidden = torch.randn(rows, width, device=device, dtype=dtype)
    weight = torch.nn.Parameter(torch.randn(columns, width, device=device, dtype=dtype) / width**0.5)
    weight.main_grad = torch.zeros(columns, width, device=device)
    settle_old(vectors, linear_logprobs_and_entropy(hidden, weight.detach(), vectors[0]).logprobs.float(), mix)
    options = CLIP | {"denominator": float(vectors[3].sum())}
    work = rows * width * columns / limits.matmul_flop_per_s

    def prepare(_: int) -> tuple:
        return (hidden.detach().requires_grad_(),)

    def ours(x: Tensor) -> None:
        linear_clipped_policy_loss(x, weight, *vectors, **options).loss.backward()

    def forward(x: Tensor) -> None:
        with torch.no_grad():
            linear_logprobs_and_entropy(x, weight, vectors[0], row_mask=vectors[3] > 0)

    name = "triton" if device.type == "cuda" else "torch"
    yield Case("linear loss + gradients", name, rows, columns, width, mix, prepare, ours, 6 * work, "6NHV")
    yield Case("linear log-probs", name, rows, columns, width, mix, prepare, forward, 2 * work, "2NHV")
    for peer, step in _eager_steps(device).items():

        def whole(x: Tensor, step=step) -> None:
            step(x @ weight.t(), *vectors, options["denominator"]).backward()
            weight.grad = None

        yield Case("linear loss + gradients", peer, rows, columns, width, mix, prepare, whole, 6 * work, "6NHV")


def plain_loss(
    logits: Tensor, targets: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, denominator: float
) -> Tensor:
    """The clipped loss with entropy beside it as a page of plain torch has it: fp32 log-softmax of everything."""
    logp = torch.log_softmax(logits.float(), dim=1)
    entropy = -(logp.detach().exp() * logp.detach()).sum(1)
    ratio = (logp.gather(1, targets[:, None]).squeeze(1) - old).clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - CLIP["eps_low"], 1 + CLIP["eps_high"])
    token_loss = torch.maximum(-ratio * advantages, -clipped * advantages)
    token_loss = torch.where(advantages < 0, token_loss.minimum(-CLIP["eps_dual"] * advantages), token_loss)
    return (weights * token_loss).sum() / denominator + 0.0 * entropy.sum()


def _eager_steps(device: torch.device) -> dict[str, Callable]:
    """torch eager everywhere; torch.compile on a GPU alone, where it needs no C++ compiler."""
    steps: dict[str, Callable] = {"torch eager": plain_loss}
    if device.type == "cuda":
        steps["torch.compile"] = torch.compile(plain_loss, dynamic=True)
    return steps
