"""A linear head, its batch, and what the materialised path makes of it: shared by the torch and the Triton tests."""

import torch
from dapo_kernels import clipped_policy_loss, linear_clipped_policy_loss, linear_logprobs_and_entropy
from dapo_kernels import logprobs_and_entropy as materialised_logprobs

OPTIONS = {"eps_low": 0.2, "eps_high": 0.28, "eps_dual": 3.0, "denominator": 7.0, "entropy_coefficient": 0.02}
FIELDS = ("logprobs", "ratio", "entropy", "clipped_low", "clipped_high", "clipped_dual")


def head_and_batch(rows, width, columns, seed, *, vocab=None, dtype=torch.float64, masked=0.25, temperature=1.0):
    """hidden [rows, width], weight [columns, width], targets, old log-probs, advantages, weights."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, weight = normal(rows, width).to(dtype), (normal(columns, width) / width**0.5 * 2).to(dtype)
    targets = torch.randint(0, vocab or columns, (rows,), generator=generator)
    scale = temperature[:, None].double() if isinstance(temperature, torch.Tensor) else temperature
    logp = torch.log_softmax((hidden.double() @ weight.double().t())[:, : vocab or columns] / scale, 1)
    old = logp.gather(1, targets[:, None]).squeeze(1) + normal(rows)
    weights = torch.rand(rows, generator=generator, dtype=torch.float64) + 0.1
    weights[torch.rand(rows, generator=generator) < masked] = 0.0
    high = torch.float64 if dtype == torch.float64 else torch.float32
    return hidden, weight, targets, old.to(high), normal(rows).to(high), weights.to(high)


def leaves(hidden, weight):
    return hidden.clone().requires_grad_(), torch.nn.Parameter(weight.clone())


def by_logits(hidden, weight, *vectors, factor=1.0, **options):
    """(PolicyLoss, d hidden, d weight) of the torch op on whole logits, in fp64."""
    x, w = leaves(hidden.double(), weight.double())
    result = clipped_policy_loss(x @ w.t(), *vectors, implementation="torch", **OPTIONS | options)
    (result.loss * factor).backward()
    return result, x.grad, w.grad


def by_chunks(hidden, weight, *vectors, factor=1.0, **options):
    x, w = leaves(hidden, weight)
    result = linear_clipped_policy_loss(x, w, *vectors, **OPTIONS | options)
    (result.loss * factor).backward()
    return result, x.grad, w.grad


def logprobs_by_logits(hidden, weight, targets, g_l, g_h, **options):
    x, w = leaves(hidden.double(), weight.double())
    found = materialised_logprobs(x @ w.t(), targets, implementation="torch", **options)
    ((found.logprobs * g_l).sum() + (found.entropy * g_h).sum()).backward()
    return found.logprobs.detach(), found.entropy.detach(), x.grad, w.grad


def logprobs_by_chunks(hidden, weight, targets, g_l, g_h, **options):
    x, w = leaves(hidden, weight)
    found = linear_logprobs_and_entropy(x, w, targets, **options)
    ((found.logprobs * g_l).sum() + (found.entropy * g_h).sum()).backward()
    return found.logprobs.detach(), found.entropy.detach(), x.grad, w.grad


def assert_same(found, wanted, **close):
    """(PolicyLoss, d hidden, d weight) both; flags equal, numbers close."""
    torch.testing.assert_close(found[0].loss.detach().double(), wanted[0].loss.detach(), **close)
    for field in FIELDS:
        left, right = getattr(found[0], field), getattr(wanted[0], field)
        if left.dtype == torch.bool:
            assert torch.equal(left, right), field
        else:
            torch.testing.assert_close(left.double(), right.double(), **close)
    for left, right in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(left.double(), right, **close)
