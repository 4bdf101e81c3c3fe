"""Run on ranks: checkpoints written under one layout and continued under others."""

from pathlib import Path

import torch.distributed as dist

from dapo_megatron.config.algorithm import Reference
from dapo_megatron.config.optimizer import Optimizer
from dapo_megatron.errors import RequestError
from dapo_megatron.learner.checkpoint import load_checkpoint, load_weights
from dapo_megatron.learner.losses import policy_loss
from dapo_megatron.learner.manifest import REFERENCE
from dapo_megatron.learner.reference import ReferenceWeights
from tests.learner.batches import load_batch
from tests.learner.layouts import build
from tests.learner.saving import save_as
from tests.learner.update_cases import CLIP, save_whole

FOLLOWS = Reference(kind="ema", decay=0.7)
SETTINGS = {"learning_rate": 1e-3, "weight_decay": 0.1, "gradient_clip": 0.5}


def _update(learner, batch) -> float:
    denominator = batch.weight_sum
    learner.gradients(batch, range(len(batch)), policy_loss(learner.head, denominator=denominator, **CLIP))
    return learner.step(SETTINGS["learning_rate"], SETTINGS["weight_decay"])


def continue_elsewhere(payload: dict) -> dict[str, float]:
    """Two updates, a checkpoint, a third update; then, from the checkpoint, the third one under every other layout. A
    reference follows by a moving average.

    Writes the weights after the third update as {name}.safetensors, the reference's as reference|{name}; returns the
    gradient norm by name, and how far the reference moved.
    """
    batch, out = load_batch(payload["batch"]), Path(payload["out"])
    norms: dict[str, float] = {}
    for distributed in (True, False):
        settings = Optimizer(distributed=distributed, **SETTINGS)

        def make(layout, settings=settings):
            return build(payload["model"], layout, budget=150, train=settings, temperature=0.9)

        def go_on(name, learner, reference, out=out, updates=payload["updates"]):
            norms[name] = _update(learner, batch)
            norms[f"reference|{name}"] = reference.move(updates + 1)
            save_whole(learner, learner.weights, out / name)
            save_whole(learner, reference.values, out / f"reference|{name}")

        learner = make(payload["from"])
        reference = ReferenceWeights(learner, FOLLOWS)
        folder = out / f"step-{distributed}"
        updates = payload["updates"]
        for step in range(updates):
            _update(learner, batch)
            reference.move(step + 1)
        state = {"step": 0, "updates": updates}
        save_as(folder, learner, state, side_files=Path(payload["model"]), reference=reference)
        go_on(f"straight|{distributed}", learner, reference)
        for layout in payload["to"]:
            learner = make(layout)
            load_checkpoint(folder, learner)
            reference = ReferenceWeights(learner, FOLLOWS)
            load_weights(folder, learner, REFERENCE, reference.values)
            go_on(f"{layout}|{distributed}", learner, reference)
    return norms


def load_into_another_model(payload: dict) -> str:
    """The message of the refusal."""
    settings = Optimizer(**SETTINGS)
    folder = Path(payload["out"]) / "step"
    learner = build(payload["model"], "tp1pp1", train=settings)
    save_as(folder, learner, {"step": 0, "updates": 0}, side_files=Path(payload["model"]))
    try:
        load_checkpoint(folder, build(payload["other"], "tp1pp1", train=settings))
    except RequestError as error:
        return str(error)
    assert dist.get_world_size() == 1
    return "loaded"
