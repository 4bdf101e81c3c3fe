"""Run on ranks: the same updates with every kernel of the loss, and with the output layer's product fused into it."""

import numpy as np
import torch

from dapo_megatron.config.optimizer import Optimizer
from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.learner.losses import policy_loss, supervised_loss
from tests.learner.batches import load_batch
from tests.learner.layouts import build
from tests.learner.update_cases import CLIP

VARIANTS = {
    "torch": {"loss_kernel": "torch"},
    "triton": {"loss_kernel": "triton"},
    "fused, torch": {"loss_kernel": "torch", "fused_linear_loss": True},
    "fused, triton": {"loss_kernel": "triton", "fused_linear_loss": True},
}


def five_steps(payload: dict) -> dict[str, dict]:
    """layout | distributed optimizer → variant → log-probs and entropy of the batch after 4 policy steps and a
    supervised one, gradient norms, launches of a kernel on the last stage."""
    from dapo_kernels.triton_rows import launches

    batch = load_batch(payload["batch"])
    total = batch.weight_sum
    report: dict[str, dict] = {}
    for layout in payload["layouts"]:
        for distributed in (True, False) if layout == "tp2pp1" else (True,):
            settings = Optimizer(distributed=distributed, learning_rate=1e-4, gradient_clip=0.5)
            for variant, options in VARIANTS.items():
                learner = build(payload["model"], layout, budget=150, train=settings, temperature=0.9, **options)
                launches.clear()
                before = np.concatenate(learner.score(batch)[0])
                norms = []
                for step in range(5):
                    loss = policy_loss(learner.head, denominator=total, **CLIP)
                    loss = loss if step < 4 else supervised_loss(learner.head, denominator=total)
                    learner.gradients(batch, range(len(batch)), loss)
                    norms.append(learner.step(settings.learning_rate, 0.1))
                logprobs, entropy = map(np.concatenate, learner.score(batch))
                count = torch.tensor(launches.total())
                torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX)
                report.setdefault(f"{layout}|{distributed}", {})[variant] = {
                    "logprobs": logprobs.tolist(),
                    "entropy": entropy.tolist(),
                    "moved": float(np.abs(logprobs - before).max()),
                    "norms": norms,
                    "launches": int(count),
                    "fused": (learner.head.output_weight is not None) or not learner.models[-1].post_process,
                }
    return report


def triton_without_a_gpu(payload: dict) -> str:
    """The message of the refusal."""
    try:
        build(payload["model"], "tp1pp1", loss_kernel="triton")
    except RequestError as refusal:
        return str(refusal)
    return "it was accepted"


def flagged_step(payload: dict) -> str:
    """The message when a kernel has set a flag although the gradient is finite."""
    from dapo_kernels.device_errors import device_flags

    batch = load_batch(payload["batch"])
    learner = build(payload["model"], "tp1pp1", train=Optimizer())
    learner.gradients(batch, range(len(batch)), policy_loss(learner.head, denominator=1.0, **CLIP))
    device_flags(torch.device("cpu"))[0] = 1
    try:
        learner.step(1e-3, 0.0)
    except RunError as problem:
        learner.step(1e-3, 0.0)  # reading cleared the flag
        return str(problem)
    return "nothing was said"
