"""Run on ranks: recomputation, bf16, masked mini-batches."""

import torch

from dapo_megatron.config.optimizer import Optimizer
from dapo_megatron.data.records import repeated
from dapo_megatron.learner.losses import policy_loss, supervised_loss
from tests.learner.batches import load_batch
from tests.learner.layouts import build
from tests.learner.update_cases import CLIP, main_gradients
from tests.learner.updates import supervised_update


def recomputation_gaps(payload: dict) -> dict[str, float]:
    """max |g − g without recomputation| / max |g| over this rank's parameters."""
    batch = load_batch(payload["batch"])
    reference, gaps = None, {}
    for recompute in ("none", "selective", "full"):
        settings = Optimizer(distributed=False)
        learner = build(payload["model"], payload["layout"], budget=90, train=settings, recompute=recompute)
        learner.gradients(batch, range(len(batch)), policy_loss(learner.head, denominator=100.0, **CLIP))
        found = {name: g.clone() for name, g in main_gradients(learner).items()}
        reference = reference or found
        gaps[recompute] = max(float((found[n] - g).abs().max() / g.abs().max()) for n, g in reference.items())
    return gaps


def train_in_bf16(payload: dict) -> dict:
    """Thirty supervised steps on one batch in fp32 and bf16: losses, and the dtypes at work."""
    batch = load_batch(payload["batch"])
    result: dict = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        learner = build(payload["model"], payload["layout"], budget=90, train=Optimizer(), dtype=dtype)
        result[name] = [supervised_update(learner, batch, 1e-3, 0.0)[0] for _ in range(30)]
        parameters = [p for m in learner.models for p in m.parameters()]
        result[f"{name} dtypes"] = [
            sorted({str(p.dtype) for p in parameters}),
            sorted({str(p.main_grad.dtype) for p in parameters}),
            sorted({str(p.dtype) for group in learner.optimizer.param_groups for p in group["params"]}),
        ]
    return result


def logits_dtype(payload: dict) -> str:
    """What the last stage hands to the loss."""
    batch = load_batch(payload["batch"])
    learner = build(payload["model"], payload["layout"], dtype=torch.bfloat16)
    seen = []

    def look(logits_TV, packed):
        seen.append(str(logits_TV.dtype))
        return logits_TV.new_zeros(())

    learner.forward_backward(learner.packs(batch, range(len(batch))), look, forward_only=True)
    return seen[0]


def nothing_to_train(payload: dict) -> list[float]:
    """Loss sum and largest gradient of a mini-batch in which one micro-batch, and then every one, is masked."""
    batch = load_batch(payload["batch"])
    learner = build(payload["model"], payload["layout"], budget=90, train=Optimizer(distributed=False))
    batch.loss_weights = [repeated(0.0, len(response)) for response in batch.responses]
    sums = learner.gradients(batch, range(len(batch)), supervised_loss(learner.head, denominator=1.0))
    return [float(sums[0]), max(float(g.abs().max()) for g in main_gradients(learner).values())]
