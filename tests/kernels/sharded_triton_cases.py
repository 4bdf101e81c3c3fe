"""Run on 4 ranks: Triton (in the interpreter) and the fused linear ops with their vocabulary cut over 2 and 4 ranks,
against one rank's fp64 torch op."""

import torch
import torch.distributed as dist
from dapo_kernels import (
    clipped_policy_loss,
    linear_clipped_policy_loss,
    linear_logprobs_and_entropy,
    logprobs_and_entropy,
)

from tests.kernels.linear_cases import FIELDS, OPTIONS, by_logits, head_and_batch, logprobs_by_logits
from tests.kernels.sharded_cases import _inputs, _worst_of_all_ranks, counted

LOSS = {
    "eps_low": 0.2, "eps_high": 0.28, "eps_dual": 3.0, "denominator": 7.0, "entropy_coefficient": 0.3,
    "temperature": 0.8,
}  # fmt: skip


def _groups() -> dict[int, dist.ProcessGroup]:
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    return {2: pairs[dist.get_rank() // 2], 4: dist.group.WORLD}


def compare(payload: dict) -> dict:
    """case → "gap" (largest difference from one rank), "forward" and "backward" (collectives), "launched"."""
    from dapo_kernels.triton_rows import launches

    report: dict[str, dict] = {}
    groups = _groups()
    for case in payload["cases"]:
        for size, group in groups.items():
            before = launches.total()
            found = _materialised(case, size, group)
            report[f"{case['name']}, {size} ranks"] = found | {"launched": launches.total() - before}
    return _worst_of_all_ranks(report)


def _materialised(case: dict, size: int, group: dist.ProcessGroup) -> dict:
    rank, part, vocab = dist.get_rank(group), case["columns"] // size, case["vocab"]
    logits, targets, *vectors = _inputs(case, part)
    logits = logits.float()
    whole = logits.double().requires_grad_()
    wanted = clipped_policy_loss(whole, targets, *vectors, vocab_size=vocab, implementation="torch", **LOSS)
    wanted.loss.backward()
    own = slice(rank * part, (rank + 1) * part)
    shard = logits[:, own].contiguous().requires_grad_()
    shared = {"vocab_size": vocab, "tensor_parallel_group": group, "implementation": "triton"}
    with counted() as forward:
        found = clipped_policy_loss(shard * 1, targets, *(v.float() for v in vectors), **LOSS, **shared)
    with counted() as backward:
        found.loss.backward()
    gaps = [*_gaps(found, wanted), shard.grad - whole.grad[:, own]]
    # log-probs and entropy with a gradient of their own
    mask = vectors[2] > 0
    leaf, reference = logits[:, own].contiguous().requires_grad_(), logits.double().requires_grad_()
    with counted() as twin:
        plain = logprobs_and_entropy(leaf * 1, targets, row_mask=mask, **shared)
    alone = logprobs_and_entropy(reference, targets, row_mask=mask, vocab_size=vocab, implementation="torch")
    for result in (plain, alone):
        (result.logprobs.sum() + 0.5 * result.entropy.sum()).backward()
    gaps += [plain.logprobs - alone.logprobs, plain.entropy - alone.entropy, leaf.grad - reference.grad[:, own]]
    return {"gap": _largest(gaps), "forward": max(len(forward), len(twin)), "backward": len(backward)}


def linear(payload: dict) -> dict:
    """The fused linear ops: case → "gap", "forward" and "backward" (collectives)."""
    report: dict[str, dict] = {}
    groups = _groups()
    for implementation, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        for size, group in groups.items():
            for sequence_parallel in (False, True):
                for masked in (0.3, 1.0) if size == 2 else (0.3,):
                    name = f"{implementation}, {size} ranks, sequence {sequence_parallel}, masked {masked}"
                    report[name] = _linear(implementation, dtype, size, group, sequence_parallel, masked)
    return _worst_of_all_ranks(report)


def _linear(implementation, dtype, size, group, sequence_parallel, masked) -> dict:
    rank, columns, vocab, rows = dist.get_rank(group), 32, 29, 24
    hidden, weight, *vectors = head_and_batch(rows, 8, columns, 3, vocab=vocab, dtype=dtype, masked=masked)
    part, slice_rows = columns // size, rows // size
    own = slice(rank * part, (rank + 1) * part)
    mine = slice(rank * slice_rows, (rank + 1) * slice_rows) if sequence_parallel else slice(None)
    shared = {
        "vocab_size": vocab, "tensor_parallel_group": group, "sequence_parallel": sequence_parallel,
        "implementation": implementation, "chunk_rows": 7,
    }  # fmt: skip
    wanted, d_hidden, d_weight = by_logits(hidden, weight, *vectors, vocab_size=vocab)
    x, w = hidden[mine].clone().requires_grad_(), weight[own].clone().requires_grad_()
    with counted() as forward:
        found = linear_clipped_policy_loss(x, w, *vectors, **OPTIONS, **shared)
    with counted() as backward:
        found.loss.backward()
    gaps = [*_gaps(found, wanted), x.grad - d_hidden[mine], w.grad - d_weight[own]]
    g_l, g_h = torch.randn(2, rows, generator=torch.Generator().manual_seed(1), dtype=dtype)
    mask = vectors[3] > 0
    alone = logprobs_by_logits(hidden, weight, vectors[0], g_l, g_h, vocab_size=vocab, row_mask=mask)
    x, w = hidden[mine].clone().requires_grad_(), weight[own].clone().requires_grad_()
    plain = linear_logprobs_and_entropy(x, w, vectors[0], row_mask=mask, **shared)
    ((plain.logprobs * g_l).sum() + (plain.entropy * g_h).sum()).backward()
    gaps += [plain.logprobs - alone[0], plain.entropy - alone[1], x.grad - alone[2][mine], w.grad - alone[3][own]]
    chunks = -(-int(mask.sum()) // 7)
    expected = chunks + 1 + sequence_parallel
    return {"gap": _largest(gaps), "surplus": abs(len(forward) - expected), "backward": len(backward)}


def _gaps(found, wanted) -> list[torch.Tensor]:
    return [found.loss.detach().double() - wanted.loss.detach()] + [
        getattr(found, field).double() - getattr(wanted, field).double() for field in FIELDS
    ]


def _largest(gaps: list[torch.Tensor]) -> float:
    # a NaN would hide in max(): it counts as infinitely far
    clean = all(bool(torch.isfinite(gap).all()) for gap in gaps)
    return max(float(gap.detach().abs().max()) for gap in gaps if gap.numel()) if clean else 1e300
