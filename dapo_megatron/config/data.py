"""Section `data`: prompts to train and to validate on."""

from typing import Annotated

from pydantic import Field

from dapo_megatron.config.section import Section


class ArithmeticTask(Section):
    """A generated task: chains of + and - with worked steps and an integer answer."""

    terms: list[Annotated[int, Field(ge=2)]] = Field([4, 5, 6], min_length=1)
    """Possible numbers of operands in a question."""

    operand_max: int = Field(9, ge=1)
    """Operands are drawn from 1 to this number."""

    total_max: int = Field(99, ge=1)
    """The running total stays between 0 and this number."""

    train_prompts: int = Field(4096, ge=1)
    """Distinct questions to train on (prompts)."""

    validation_prompts: int = Field(256, ge=1)
    """Distinct held-out questions (prompts)."""

    supervised_examples: int = Field(20000, ge=0)
    """Rows of each generated supervised set (examples)."""

    direct_fraction: float = Field(0.6, ge=0, le=1)
    """Share of the set `mixed` that answers at once without worked steps."""


class Data(Section):
    """Where prompts come from and how they are read."""

    train: str | None = Field(None, min_length=1)
    """Training prompts, .jsonl or .parquet; relative to the current working directory."""

    validation: str | None = Field(None, min_length=1)
    """Validation prompts, .jsonl or .parquet; relative to the current working directory."""

    prompt_column: str = Field("prompt", min_length=1)
    """Column with the prompt: text, or a list of {role, content}."""

    answer_column: str = Field("answer", min_length=1)
    """Column with the reference answer; dots reach into nested columns."""

    max_prompt_length: int = Field(2048, ge=1)
    """Longest prompt accepted (tokens); a longer one is refused before training starts."""

    chat_template: bool = False
    """Whether the tokenizer's chat template is applied to prompts."""

    shuffle: bool = True
    """Whether every epoch has a new order; false keeps the file's."""

    generate: ArithmeticTask | None = None
    """A task to generate; its train and validation files are written to the run directory and used. null = none."""
