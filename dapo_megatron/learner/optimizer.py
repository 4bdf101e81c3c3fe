"""megatron's optimizer over the model chunks, and the learning rate of a step."""

import math

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from dapo_megatron.config.optimizer import Optimizer


def build_optimizer(
    settings: Optimizer, chunks: list[DistributedDataParallel], *, dtype: torch.dtype
) -> MegatronOptimizer:
    """AdamW with fp32 main parameters; moments sharded over data-parallel ranks when `optimizer.distributed`.

    Vectors (norms, biases) have weight-decay multiplier 0.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.learning_rate,
        min_lr=settings.min_learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        clip_grad=settings.gradient_clip,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=settings.distributed,
    )
    for chunk in chunks:
        _count_bucket_padding(chunk)
    return get_megatron_optimizer(config, chunks)


def _count_bucket_padding(chunk: DistributedDataParallel) -> None:
    """Let a checkpoint keep the padding between gradient buckets.

    megatron-core 0.16 drops it when it gathers optimizer state and then cuts parameters out at offsets that count it:
    with two buckets (tied embeddings have one of their own) the state of the later ones would be saved shifted.
    """
    for buffer in chunk.buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()


def set_rates(optimizer: MegatronOptimizer, learning_rate: float, weight_decay: float) -> None:
    """Set both for the next step. megatron honours `wd_mult` only through its own scheduler, so it is applied here."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
        group["weight_decay"] = weight_decay * group["wd_mult"]


def parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of a chained one, or itself."""
    return getattr(optimizer, "chained_optimizers", [optimizer])


@torch.no_grad()
def reduced_norm(optimizer: MegatronOptimizer) -> float:
    """The gradient's global norm (L2) before clipping, as this rank has it. Weights and moments are not touched: with
    `clip_and_update` this is megatron's own step, in two halves that something may be decided between."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm() or 0.0)


@torch.no_grad()
def clip_and_update(optimizer: MegatronOptimizer, norm: float) -> None:
    """The rest of the step after `reduced_norm`."""
    for part in parts(optimizer):
        if parameters := [] if part.is_stub_optimizer else part.get_parameters():
            clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=norm)
    optimizer.step_with_ready_grads()


def scheduled_rate(
    step: int, total: int, *, peak: float, least: float = 0.0, warmup: int = 0, schedule: str = "constant"
) -> float:
    """Learning rate of step 0 ≤ step < total.

    Warm-up: peak · (step + 1) / warmup while step < warmup. Then, with x the share of the remaining steps that is done:
    constant: peak; linear: peak + x·(least − peak); cosine: least + (peak − least)·(1 + cos πx) / 2.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    x = min(1.0, (step - warmup) / max(1, total - warmup))
    if schedule == "linear":
        return peak + x * (least - peak)
    if schedule == "cosine":
        return least + (peak - least) * (1 + math.cos(math.pi * x)) / 2
    return peak
