"""Section `optimizer`: AdamW and its schedule for the policy updates."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dapo_megatron.config.section import Section


class Guard(Section):
    """Updates that are not made: weights, moments and counts stay as they were, on every rank, and the run goes on with
    the next mini-batch. Policy, critic and supervised stages are watched apart, each with a window of its own."""

    non_finite: bool = True
    """Whether an update whose loss or gradient norm is not a finite number is skipped; false = the run ends there."""

    norm_spike: float | None = Field(None, gt=1)
    """Skip where the gradient norm before clipping is above this many times the median of the window; null = never."""

    loss_spike: float | None = Field(None, gt=0)
    """Skip where the loss is further from the window's median than this many times the median of such distances (which
    must be above 0); null = never."""

    window: int = Field(64, ge=4)
    """Latest updates made, whose norms and losses the medians are of; spikes are looked for once half are there."""

    most_skips: int = Field(3, ge=1)
    """The run ends with the skip that makes so many ..."""

    among: int = Field(10, ge=1)
    """... among this many latest updates, made or skipped; the same number for both = so many in a row."""

    @model_validator(mode="after")
    def _can_be_reached(self) -> Self:
        if self.most_skips > self.among:
            raise ValueError(
                f"most_skips={self.most_skips} cannot be among={self.among} updates; use most_skips={self.among}"
            )
        return self


class Optimizer(Section):
    """AdamW; the schedule counts rollout steps, not updates."""

    learning_rate: float = Field(1e-6, ge=0)
    """Learning rate after the warm-up; 0 is a control experiment."""

    min_learning_rate: float = Field(0.0, ge=0)
    """Learning rate at the end of the cosine schedule."""

    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or falling as a cosine until run.steps."""

    warmup_rollout_steps: int = Field(20, ge=0)
    """Linear warm-up (rollout steps)."""

    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay (per unit of learning rate)."""

    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the gradient's running mean."""

    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the squared gradient's running mean."""

    epsilon: float = Field(1e-8, gt=0)
    """Added to the root of the squared gradient's mean."""

    gradient_clip: float = Field(1.0, gt=0)
    """Largest global gradient norm (L2)."""

    distributed: bool = True
    """Whether the optimizer's state is cut over the data-parallel ranks."""

    guard: Guard = Guard()
    """Updates that are skipped, and when the run ends over them."""
