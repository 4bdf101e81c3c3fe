"""Run on ranks: the losses with their vocabulary cut over 2 and 4 ranks against the whole on one."""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from dapo_kernels import clipped_policy_loss, logprobs_and_entropy

COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single",
    "barrier", "broadcast", "gather", "irecv", "isend", "recv", "reduce", "reduce_scatter", "reduce_scatter_tensor",
    "scatter", "send",
)  # fmt: skip


@contextmanager
def counted():
    """Names of the collectives called inside, in order."""
    calls: list[str] = []
    real = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str):
        def call(*args, **kwargs):
            calls.append(name)
            return real[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def compare(payload: dict) -> dict:
    """case → "gap" (largest difference of any output or gradient), "forward" and "backward" (collectives called)."""
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    groups = {2: pairs[dist.get_rank() // 2], 4: dist.group.WORLD}
    report: dict[str, dict] = {}
    for case in payload["cases"]:
        for size, group in groups.items():
            for in_place in (True, False):
                name = f"{case['name']}, {size} ranks{', in place' * in_place}"
                report[name] = _one(case, size, group, in_place)
    return _worst_of_all_ranks(report)


def _one(case: dict, size: int, group: dist.ProcessGroup, in_place: bool) -> dict:
    columns, vocab, rank = case["columns"], case["vocab"], dist.get_rank(group)
    part = columns // size
    tensors = _inputs(case, part)
    logits, others = tensors[0], tensors[1:]
    options = {
        "eps_low": 0.2, "eps_high": 0.28, "eps_dual": 3.0, "denominator": 7.0, "entropy_coefficient": 0.3,
        "temperature": 0.8, "vocab_size": vocab,
    }  # fmt: skip
    whole = logits.clone().requires_grad_()
    wanted = clipped_policy_loss(whole, *others, **options)
    wanted.loss.backward()
    shard = logits[:, rank * part : (rank + 1) * part].clone().contiguous().requires_grad_()
    with counted() as forward:
        found = clipped_policy_loss(shard, *others, **options, tensor_parallel_group=group, in_place=in_place)
    with counted() as backward:
        found.loss.backward()
    gaps = [shard.grad - whole.grad[:, rank * part : (rank + 1) * part], found.loss.detach() - wanted.loss.detach()]
    gaps += [getattr(found, f).double() - getattr(wanted, f).double() for f in ("logprobs", "ratio", "entropy")]
    gaps += [
        (getattr(found, f) != getattr(wanted, f)).double() for f in ("clipped_low", "clipped_high", "clipped_dual")
    ]
    plain = logprobs_and_entropy(
        logits[:, rank * part : (rank + 1) * part].contiguous(), others[0].clamp(0, vocab - 1),
        vocab_size=vocab, tensor_parallel_group=group, row_mask=others[3] > 0,
    )  # fmt: skip
    alone = logprobs_and_entropy(logits, others[0].clamp(0, vocab - 1), vocab_size=vocab, row_mask=others[3] > 0)
    gaps += [plain.logprobs - alone.logprobs, plain.entropy - alone.entropy]
    gap = max(float(g.abs().max()) if g.numel() else 0.0 for g in gaps)
    # a NaN would hide in max(): it counts as infinitely far
    clean = all(bool(torch.isfinite(g).all()) for g in gaps)
    moved = bool(wanted.loss.detach() != 0 and whole.grad.any())
    return {"gap": gap if clean else 1e300, "forward": len(forward), "backward": len(backward), "moved": moved}


def _inputs(case: dict, part: int) -> list[torch.Tensor]:
    """The same on every rank; targets sit on the shard edges first."""
    generator = torch.Generator().manual_seed(case["seed"])
    rows, columns, vocab = case["rows"], case["columns"], case["vocab"]
    logits = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * 3
    if case["kind"] == "negative":
        logits = -logits.abs() - 200
    edges = [e for k in range(columns // part) for e in (k * part, (k + 1) * part - 1) if e < vocab] + [vocab - 1]
    targets = torch.tensor([edges[i % len(edges)] for i in range(rows)], dtype=torch.int64)
    if case["kind"] == "-inf shard":
        logits[:, :part] = float("-inf")
        targets = targets.clamp(min=part)
    logits[:, vocab:] = float("nan")  # padding is never looked at
    true = torch.log_softmax(logits[:, :vocab] / 0.8, 1).gather(1, targets[:, None]).squeeze(1)
    old = true + torch.randn(rows, generator=generator, dtype=torch.float64)
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64) * (torch.arange(rows) % 4 != 3)
    if case["kind"] == "no weight":
        weights.zero_()
    return [logits, targets, old, advantages, weights]


def _worst_of_all_ranks(report: dict[str, dict]) -> dict[str, dict]:
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, report)
    return {name: {key: max(float(part[name][key]) for part in everyone) for key in report[name]} for name in report}
