"""Run on ranks: losses, gradients and optimizer steps of the learner under many layouts."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from safetensors.torch import load_file, save_file
from torch import Tensor

from dapo_megatron.config.optimizer import Optimizer
from dapo_megatron.config.resharding import Resharding
from dapo_megatron.data.records import SequenceBatch, sequence_batch
from dapo_megatron.learner.critic import copy_decoder
from dapo_megatron.learner.learner import Learner
from dapo_megatron.learner.losses import POLICY_SUMS, VALUE_SUMS, policy_loss, value_loss
from dapo_megatron.weight_sync import whole_on_rank_zero
from tests.learner.batches import load_batch
from tests.learner.layouts import build
from tests.learner.updates import supervised_update

CLIP = {"eps_low": 0.2, "eps_high": 0.28, "eps_dual": 3.0, "entropy_coefficient": 0.01}
VALUE_CLIP = 0.5


def gradients(payload: dict) -> dict[str, list[float]]:
    """For each "model layout budget": write the whole gradient to a file; returns the policy sums. With "critic" also
    what `critic_gradients` returns of it, under that name."""
    results = {}
    batch = load_batch(payload["batch"])
    denominator = batch.weight_sum
    for model_name, folder in payload["models"].items():
        for layout in payload["layouts"]:
            for budget in payload["budgets"]:
                # the buffers of a distributed optimizer hold shards; whole gradients are compared without it
                learner = build(folder, layout, budget=budget, train=Optimizer(distributed=False), temperature=0.9)
                sums = learner.gradients(
                    batch,
                    range(len(batch)),
                    policy_loss(learner.head, denominator=denominator, **CLIP, **payload["kl"]),
                )
                name = f"{model_name}|{layout}|{budget}"
                save_whole(learner, main_gradients(learner), Path(payload["out"]) / f"{dist.get_world_size()}|{name}")
                count = max(len(rank) for rank in learner.packing(batch, range(len(batch))))
                results[name] = [*sums.tolist(), count, learner.layout.data]
    assert len(sums) == len(POLICY_SUMS)
    if "critic" in payload:
        results["critic"] = critic_gradients(payload | {"batch": payload["critic_batch"]})
    return results


def critic_gradients(payload: dict) -> dict[str, dict]:
    """For each "layout budget" of a critic: write the whole gradient to a file; returns the sums and the values. For a
    layout of stages also whether a critic that begins as the policy "copied", of the same decoder, has these values."""
    results = {}
    batch = load_batch(payload["batch"])
    for layout in payload["layouts"]:
        for budget in payload["budgets"] if dist.get_world_size() == 1 else payload["budgets"][-1:]:
            settings = Optimizer(distributed=False)
            critic = build(payload["critic"], layout, budget=budget, train=settings, critic=True)
            values = critic.values(batch)
            loss = value_loss(denominator=batch.weight_sum, clip=VALUE_CLIP)
            sums = critic.gradients(batch, range(len(batch)), loss)
            name = f"{dist.get_world_size()}|critic|{layout}|{budget}"
            save_whole(critic, main_gradients(critic), Path(payload["out"]) / name)
            results[name] = {
                "sums": dict(zip(VALUE_SUMS, sums.tolist(), strict=True)),
                "values": [v.tolist() for v in values],
                "norm": critic.step(0.0, 0.0),
                "kept by copying": True,
            }
            if layout == "tp1pp2":
                for key, weight in critic.weights.items():
                    if "output_layer" not in key:
                        weight.zero_()
                copy_decoder(build(payload["copied"], layout), critic, Resharding())
                same = zip(critic.values(batch), values, strict=True)
                results[name]["kept by copying"] = all(np.array_equal(a, b) for a, b in same) and _copied_in_bf16(
                    payload, layout, batch
                )
    return results


def _copied_in_bf16(payload: dict, layout: str, batch: SequenceBatch) -> bool:
    """Whether an optimizer step at rate 0, from fp32 copies, leaves a critic's bf16 decoder at the policy's."""
    policy = build(payload["copied"], layout, dtype=torch.bfloat16)
    for weight in policy.weights.values():
        weight.mul_(2)
    critic = build(payload["critic"], layout, train=Optimizer(), critic=True, dtype=torch.bfloat16)
    copy_decoder(policy, critic, Resharding())
    critic.gradients(batch, range(len(batch)), value_loss(denominator=batch.weight_sum, clip=None))
    critic.step(0.0, 0.0)
    return all(torch.equal(w, policy.weights[key]) for key, w in critic.weights.items() if "output_layer" not in key)


def updated_weights(payload: dict) -> dict[str, list[float]]:
    """Three policy updates with a distributed or an ordinary optimizer; writes the weights, returns the gradient
    norms."""
    batch = load_batch(payload["batch"])
    denominator = batch.weight_sum
    results = {}
    for layout in payload["layouts"]:
        for distributed in (True, False):
            settings = Optimizer(distributed=distributed, learning_rate=1e-3, weight_decay=0.1, gradient_clip=0.5)
            learner = build(payload["model"], layout, budget=payload["budget"], train=settings, temperature=0.9)
            norms = []
            for _ in range(3):
                learner.gradients(batch, range(len(batch)), policy_loss(learner.head, denominator=denominator, **CLIP))
                norms.append(learner.step(settings.learning_rate, settings.weight_decay))
            name = f"{dist.get_world_size()}|{layout}|{distributed}"
            save_whole(learner, learner.weights, Path(payload["out"]) / name)
            results[name] = norms
    return results


def supervised_losses(payload: dict) -> list[list[float]]:
    """[(loss, gradient norm)] of twenty supervised steps, with weight decay and warm-up."""
    settings = Optimizer(beta1=0.9, beta2=0.95, epsilon=1e-8, gradient_clip=1.0)
    learner = build(payload["model"], payload["layout"], train=settings, budget=payload["budget"])
    tokens = load_file(payload["tokens"])
    results = []
    for step in range(20):
        prompts = [tokens[f"{step}.{i}.prompt"].numpy() for i in range(payload["sequences"])]
        responses = [tokens[f"{step}.{i}.response"].numpy() for i in range(payload["sequences"])]
        rate = payload["learning_rate"] * min(1.0, (step + 1) / 5)
        results.append(list(supervised_update(learner, sequence_batch(prompts, responses), rate, 0.1)))
    return results


def module_shapes(payload: dict) -> dict[str, list]:
    """Of the live model: class and weight shape of every parallel linear of its first chunk."""
    learner = build(payload["model"], payload["layout"])
    return {
        name: [type(module).__name__, list(module.weight.shape)]
        for name, module in learner.models[0].named_modules()
        if isinstance(module, ColumnParallelLinear | RowParallelLinear)
    }


def main_gradients(learner: Learner) -> dict[str, Tensor]:
    return {f"chunk{v}.{n}": p.main_grad for v, m in enumerate(learner.models) for n, p in m.named_parameters()}


def save_whole(learner: Learner, local: dict[str, Tensor], path: Path) -> None:
    names = list(learner.weight_layout.shapes)
    whole = whole_on_rank_zero(learner, local, names, dtype=torch.float32, time_limit_s=60)
    if whole is not None:
        save_file(whole, f"{path}.safetensors")
