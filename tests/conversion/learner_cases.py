"""Run on ranks: learners that write checkpoints for conversion and load converted ones."""

from pathlib import Path

import numpy as np
import torch
from megatron.core import dist_checkpointing

from dapo_megatron.config.optimizer import Optimizer
from dapo_megatron.learner.checkpoint import load_checkpoint
from dapo_megatron.learner.losses import policy_loss
from tests.data.test_group_files import group
from tests.learner.batches import load_batch
from tests.learner.layouts import build
from tests.learner.saving import save_as
from tests.learner.update_cases import CLIP, save_whole

SETTINGS = {"learning_rate": 1e-3, "weight_decay": 0.1, "gradient_clip": 0.5}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _update(learner, batch) -> float:
    denominator = batch.weight_sum
    learner.gradients(batch, range(len(batch)), policy_loss(learner.head, denominator=denominator, **CLIP))
    return learner.step(SETTINGS["learning_rate"], SETTINGS["weight_decay"])


def same_as_from_hugging_face(payload: dict) -> list[str]:
    """For each case (model, converted checkpoint, dtype): a learner that starts from other weights and loads the
    checkpoint must equal, under each layout, one that read the Hugging Face folder. Returns what differs."""
    batch = load_batch(payload["batch"])
    wrong = []
    for case in payload["cases"]:
        for name in case["layouts"]:
            expected = build(case["model"], name, dtype=DTYPES[case["dtype"]])
            found = build(case["other"], name, dtype=DTYPES[case["dtype"]])
            load_checkpoint(Path(case["checkpoint"]), found)
            wrong += [
                f"{case['checkpoint']} {name} {key}"
                for key, tensor in expected.weights.items()
                if not torch.equal(tensor, found.weights[key])
            ]
            scores = ([part for parts in learner.score(batch) for part in parts] for learner in (expected, found))
            if not all(np.array_equal(a, b) for a, b in zip(*scores, strict=True)):
                wrong.append(f"{case['checkpoint']} {name}: log-probs")
    return wrong


def write_trained(payload: dict) -> bool:
    """Two updates at TP2 x PP2, then a checkpoint with optimizer state, for each of `payload["kinds"]` (dtype, whether
    the optimizer is distributed); and one of the model alone."""
    batch, out = load_batch(payload["batch"]), Path(payload["out"])
    for dtype, distributed in payload["kinds"]:
        settings = Optimizer(distributed=distributed, **SETTINGS)
        learner = build(payload["model"], "tp2pp2", budget=150, train=settings, dtype=DTYPES[dtype])
        for _ in range(2):
            _update(learner, batch)
        folder = out / f"{dtype}-{distributed}"
        state = {"step": 3, "updates": 2, "layout": {"tensor": 2}}
        kept = [group(0, [3, 1], scored=True)]
        save_as(folder, learner, state, side_files=Path(payload["model"]), groups=kept)
        save_whole(learner, learner.weights, out / f"{dtype}-{distributed}")
    plain = build(payload["model"], "tp2pp2", dtype=torch.bfloat16)
    save_as(out / "plain", plain, {"step": 0, "updates": 0}, side_files=Path(payload["model"]))
    return True


def continue_converted(payload: dict) -> dict[str, list[float]]:
    """The third update from each checkpoint, original and converted, under one layout; gradient norms, and by name
    whether the weights afterwards are equal."""
    batch, out = load_batch(payload["batch"]), Path(payload["out"])
    norms = {}
    for dtype, distributed in payload["kinds"]:
        settings = Optimizer(distributed=distributed, **SETTINGS)
        weights = []
        name = f"{dtype}-{distributed}"
        norms[name] = []
        for folder in (name, f"{name}-converted"):
            learner = build(payload["other"], payload["layout"], budget=150, train=settings, dtype=DTYPES[dtype])
            load_checkpoint(out / folder, learner)
            norms[name].append(_update(learner, batch))
            weights.append({key: tensor.clone() for key, tensor in learner.weights.items()})
        equal = all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
        norms[name].append(float(equal))
    return norms


def load_with_megatron_alone(payload: dict) -> list[str]:
    """`dist_checkpointing.load` with every strictness, no code of ours between; returns what differs."""
    learner = build(payload["other"], "tp2pp2")
    expected = build(payload["model"], "tp2pp2")
    template = {"model0": learner.models[0].sharded_state_dict()}
    loaded, missing, unexpected = dist_checkpointing.load(
        template, str(Path(payload["checkpoint"]) / "shards"), strict="return_all"
    )
    learner.models[0].load_state_dict(loaded["model0"], strict=False)
    differing = [key for key, tensor in expected.weights.items() if not torch.equal(tensor, learner.weights[key])]
    return [*differing, *(f"missing {key}" for key in missing), *(f"unexpected {key}" for key in unexpected)]
