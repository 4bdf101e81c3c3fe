"""Triton's kernels beside plain torch in fp64: loss, log-probs, entropies and the gradient of the logits."""

import os
from collections.abc import Callable
from importlib.util import find_spec

import torch
from dapo_kernels import PolicyLoss, clipped_policy_loss
from torch import Tensor

from dapo_megatron.doctor.parity_model import Trial
from dapo_megatron.doctor.verdict import Measurement, Skipped

# of the largest value: sums of fp32 in another order; a gradient that is rounded to bf16
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2**-7}
ROWS, INTERPRETED = 512, (24, 193)  # on a GPU; rows and vocabulary in the interpreter

Loss = Callable[..., PolicyLoss]


def kernels(trial: Trial, device: torch.device) -> Measurement:
    """The largest error in fp32 and bf16, as a multiple of the rounding that is allowed.

    Raises:
        Skipped: Triton is not installed, or has no device to run on.
    """
    if find_spec("triton") is None:
        raise Skipped("triton is not installed")
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise Skipped("this machine has a GPU that torch does not see: run `dapo-megatron doctor`")
    rows, vocabulary = (ROWS, trial.vocabulary) if device.type == "cuda" else INTERPRETED
    gap = kernel_gap(clipped_policy_loss, trial, device, rows=rows, vocabulary=vocabulary)
    how = f"on {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "in Triton's interpreter"
    return Measurement(gap, 1.0, f"times the rounding allowed, {rows} x {vocabulary} logits {how}")


def kernel_gap(candidate: Loss, trial: Trial, device: torch.device, *, rows: int, vocabulary: int) -> float:
    """max over dtypes and results of |candidate − fp64| / (max |fp64| · ALLOWED); infinity where it is not finite."""
    worst = 0.0
    for dtype, allowed in ALLOWED.items():
        logits, settings = _inputs(trial, rows, vocabulary, dtype, device)
        found = _results(candidate, logits, {**settings, "implementation": "triton"})
        exact = _results(clipped_policy_loss, logits.double(), {**settings, "implementation": "torch"})
        for ours, theirs in zip(found, exact, strict=True):
            gap = float((ours.double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)) / allowed
            worst = max(worst, gap) if gap == gap else float("inf")
    return worst


def _inputs(
    trial: Trial, rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    columns = -(-vocabulary // 64) * 64  # padded, as the learner's logits are
    logits = (2 * torch.randn(rows, columns, generator=generator)).to(dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    exact = torch.log_softmax(logits[:, :vocabulary].double() / trial.temperature, -1)
    old = exact.gather(1, targets[:, None])[:, 0].float() + 0.3 * torch.randn(rows, generator=generator)
    rest = {
        "targets": targets,
        "old_logprobs": old,
        "advantages": torch.randn(rows, generator=generator),
        "loss_mask": (torch.rand(rows, generator=generator) < 0.8).float(),
    }
    settings: dict[str, object] = {name: tensor.to(device) for name, tensor in rest.items()}
    settings |= {
        "eps_low": trial.eps_low,
        "eps_high": trial.eps_high,
        "denominator": float(rest["loss_mask"].sum()),
        "temperature": trial.temperature,
        "entropy_coefficient": 0.01,
        "vocab_size": vocabulary,
        "in_place": False,
    }
    return logits.to(device), settings


def _results(loss: Loss, logits: Tensor, settings: dict[str, object]) -> tuple[Tensor, ...]:
    leaf = logits.clone().requires_grad_()
    result = loss(leaf, **settings)
    result.loss.backward()
    return result.loss.detach(), result.logprobs.detach(), result.entropy.detach(), leaf.grad
