"""Section `optimizer`: AdamW and its schedule for the policy updates."""

from typing import Literal

from pydantic import Field

from dapo_megatron.config.section import Section


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
