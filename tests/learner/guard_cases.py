"""Run on ranks: updates that the guard skips, beside a learner that never saw their mini-batches."""

from functools import partial

import torch

from dapo_megatron.config.optimizer import Guard, Optimizer
from dapo_megatron.learner.learner import Learner
from dapo_megatron.learner.losses import policy_loss, value_loss
from dapo_megatron.learner.offload import OptimizerMemory
from dapo_megatron.update_guard import UpdateGuard, guarded_update
from tests.learner.batches import load_batch
from tests.learner.checkpoint_cases import SETTINGS
from tests.learner.layouts import build
from tests.learner.offload_cases import _equal, state_of
from tests.learner.update_cases import CLIP

RATE = SETTINGS["learning_rate"]


def skipped_alike(payload: dict) -> dict[str, list[str]]:
    """By case, what did not hold on some rank."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    found: dict[str, list[str]] = {}
    for case in payload["cases"]:
        held = _one_case(payload, rank=rank, **case)
        everywhere: list[dict[str, bool]] = [{}] * world
        torch.distributed.all_gather_object(everywhere, held)
        found[str(case)] = sorted({what for of_rank in everywhere for what, is_so in of_rank.items() if not is_so})
    return found


def _one_case(
    payload: dict, *, rank: int, layout: str, dtype: str, distributed: bool, critic: bool = False, offload: bool = False
) -> dict[str, bool]:
    batch = load_batch(payload["batch"])
    batch.returns = batch.old_values = batch.advantages

    def make() -> Learner:
        settings = Optimizer(distributed=distributed, **SETTINGS)
        options = {"train": settings, "dtype": getattr(torch, dtype), "critic": critic, "beside": True, "budget": 150}
        return build(payload["model"], layout, **options)

    def gradients(learner: Learner) -> float:
        loss = (
            policy_loss(learner.head, denominator=40.0, **CLIP)
            if not critic
            else value_loss(denominator=40.0, clip=None)
        )
        return float(learner.gradients(batch, range(len(batch)), loss)[0])

    alone = make()
    for _ in range(3):
        gradients(alone)
        alone.step(RATE, 0.1)

    learner = make()
    memory = OptimizerMemory([learner], offload=offload)
    guard = UpdateGuard(Guard(norm_spike=20.0, window=4, most_skips=9), "policy")
    update = partial(guarded_update, learner, guard, learning_rate=RATE, weight_decay=0.1, batch=dict)
    held: dict[str, bool] = {}
    for number in range(3):
        with memory.on_device():
            held[f"update {number} is made"] = update(gradients(learner), step=number) is not None
            before = state_of(learner)
            loss = gradients(learner)
            held["a loss that is not a number"] = update(float("nan"), step=number) is None
            # one rank's share of the gradient, as by a fault of its own: the others must hear of it
            _spoil(learner, rank == 1, float("inf"))
            held["one rank's infinity"] = update(loss, step=number) is None
            gradients(learner)
            if number == 2:
                _spoil(learner, True, 1e4)
                held["a spike"] = update(loss, step=number) is None
            held[f"bits after skip {number}"] = _equal(before, state_of(learner))
    with memory.on_device():
        held["as if it had never been"] = _equal(state_of(alone), state_of(learner))
    held["all are told"] = guard.total == 7 and len(guard.take()) == 7
    return held


def broken_logits(payload: dict) -> dict[str, str]:
    """A weight of one rank turns into a NaN for one mini-batch, and back: what was told, and how the run went on."""
    batch, told = load_batch(payload["batch"]), {}
    learner = build(payload["model"], payload["layout"], train=Optimizer(**SETTINGS), budget=150)
    guard = UpdateGuard(Guard(), "policy")
    update = partial(guarded_update, learner, guard, learning_rate=RATE, weight_decay=0.1, step=1, batch=dict)
    name, weight = list(learner.weights.items())[-1]
    kept = weight.clone()
    if torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
        weight.view(-1)[0] = float("nan")
    loss = policy_loss(learner.head, denominator=40.0, **CLIP)
    sums = learner.gradients(batch, range(len(batch)), loss)
    told["skipped"] = str(update(float(sums[0])))
    weight.copy_(kept)
    sums = learner.gradients(batch, range(len(batch)), loss)
    told["after"] = str(update(float(sums[0])) is not None)
    return told | {"reason": guard.skipped[0]["reason"], "name": name}


def _spoil(learner: Learner, here: bool, factor: float) -> None:
    """The gradient of this rank times `factor`."""
    for chunk in learner.chunks:
        for buffer in chunk.buffers:
            if here:
                buffer.grad_data.mul_(factor)
