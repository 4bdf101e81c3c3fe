"""Supervised stages (warm start): −log π of given responses, through the same learner."""

import math
import time
from collections.abc import Callable, Sequence

import numpy as np

from dapo_megatron.config.supervised import Stage
from dapo_megatron.data.packing import packing_efficiency
from dapo_megatron.data.prompts import Example
from dapo_megatron.data.records import SequenceBatch, repeated, sequence_batch
from dapo_megatron.data.sampler import PromptSampler
from dapo_megatron.learner.learner import Learner
from dapo_megatron.learner.losses import SUPERVISED_SUMS, supervised_loss
from dapo_megatron.learner.optimizer import scheduled_rate
from dapo_megatron.update_guard import UpdateGuard, guarded_update


def run_stage(
    learner: Learner,
    stage: Stage,
    examples: Sequence[Example],
    *,
    seed: int,
    done: int = 0,
    guard: UpdateGuard | None = None,
    report: Callable[[dict[str, float]], bool],
) -> int:
    """Train on `stage.steps` batches drawn from `examples`, from step `done` on; returns the steps done in all.

    `report(metrics)` is called after every step and answers whether to stop. `guard`: judges every update.
    """
    sampler = PromptSampler(len(examples), seed, shuffle=True)
    sampler.take(done * stage.batch_sequences)
    for step in range(done, stage.steps):
        started = time.perf_counter()
        numbers = sampler.take(stage.batch_sequences)
        batch = weighted_batch([examples[i] for i in numbers])
        rate = scheduled_rate(
            step,
            stage.steps,
            peak=stage.learning_rate,
            least=stage.min_learning_rate,
            warmup=stage.warmup_steps,
            schedule=stage.schedule,
        )
        sums = supervised_gradients(learner, batch)
        norm = guarded_update(
            learner,
            guard,
            sums["loss"],
            learning_rate=rate,
            weight_decay=stage.weight_decay,
            step=0,  # before the first rollout step
            batch=lambda numbers=numbers: {"stage": stage.data, "examples": [int(i) for i in numbers]},
        )
        stop = report(
            {
                "loss/supervised": sums["loss"],
                "grad_norm": math.nan if norm is None else norm,
                "guard/skipped": float(norm is None),
                "learning_rate": rate,
                "tokens/trained": float(sum(np.count_nonzero(weights) for weights in batch.loss_weights)),
                "packing/efficiency": packing_efficiency(batch.lengths, learner.packing(batch, range(len(batch)))),
                "time/step": time.perf_counter() - started,
            }
        )
        if stop:
            return step + 1
    return stage.steps


def weighted_batch(examples: Sequence[Example]) -> SequenceBatch:
    """Their sequences; the loss weight of a response token is the weight of its example."""
    batch = sequence_batch([example.prompt for example in examples], [example.response for example in examples])
    batch.loss_weights = [repeated(example.weight, len(example.response)) for example in examples]
    return batch


def supervised_gradients(learner: Learner, batch: SequenceBatch) -> dict[str, float]:
    """Leave the gradient of the mean −log π over the batch's weighted tokens; returns its sums by name."""
    loss = supervised_loss(learner.head, denominator=batch.weight_sum)
    return dict(zip(SUPERVISED_SUMS, learner.gradients(batch, range(len(batch)), loss).tolist(), strict=True))
