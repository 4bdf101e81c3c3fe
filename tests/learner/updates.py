"""An update as the cases of several rooms make it."""

from dapo_megatron.data.records import SequenceBatch
from dapo_megatron.learner.learner import Learner
from dapo_megatron.supervised import supervised_gradients


def supervised_update(
    learner: Learner, batch: SequenceBatch, learning_rate: float, weight_decay: float
) -> tuple[float, float]:
    """One optimizer step on the mean −log π over the batch's weighted tokens; returns (loss, gradient norm)."""
    loss = supervised_gradients(learner, batch)["loss"]
    return loss, learner.step(learning_rate, weight_decay)
