"""Section `supervised`: training on worked examples before the first rollout step."""

from typing import Literal

from pydantic import Field

from dapo_megatron.config.section import Section

GENERATED = ("worked", "mixed")
"""Supervised sets that `data.generate` writes."""


class Stage(Section):
    """One stage of supervised training with its own data and schedule."""

    data: str = Field(min_length=1)
    """File of prompts and responses, of the kinds data.train takes; with data.generate also `worked` or `mixed`."""

    prompt_column: str = Field("prompt", min_length=1)
    """Column with the prompt: text, or a list of {role, content}; it gets data.prompt_template."""

    response_column: str = Field("response", min_length=1)
    """Column with the response; dots reach into nested columns."""

    response_template: str = Field("{response}", pattern=r"\{response\}")
    """Text with {response} that makes a response of the column, for example `Answer: {response}`."""

    weight_column: str | None = Field(None, min_length=1)
    """Column with the weight of the row's tokens in the loss, a number more than 0; null = all weigh 1."""

    steps: int = Field(ge=1)
    """Updates in this stage."""

    batch_sequences: int = Field(ge=1)
    """Examples in one update (sequences)."""

    learning_rate: float = Field(ge=0)
    """Learning rate after the warm-up."""

    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning rate after the warm-up: constant, or falling to min_learning_rate at the last step."""

    min_learning_rate: float = Field(0.0, ge=0)
    """Learning rate at the end of a falling schedule."""

    warmup_steps: int = Field(0, ge=0)
    """Linear warm-up (updates)."""

    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay (per unit of learning rate)."""


class Supervised(Section):
    """Stages run in order through the same learner; none by default."""

    stages: list[Stage] = Field(default_factory=list)
    """Stages in the order they run."""
