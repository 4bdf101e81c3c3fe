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

    terse_fraction: float = Field(0.0, ge=0, le=1)
    """Share of the set `mixed` whose worked steps write each total once."""


class Data(Section):
    """Where prompts come from and how they are read."""

    train: str | None = Field(None, min_length=1)
    """Training prompts: .jsonl, .parquet or .json from the current working directory, or hub:ORG/NAME[:SPLIT]."""

    validation: str | None = Field(None, min_length=1)
    """Validation prompts, as `data.train`; a question that is trained on is refused."""

    prompt_column: str = Field("prompt", min_length=1)
    """Column with the prompt: text, or a list of {role, content}."""

    chosen_column: str = Field("chosen", min_length=1)
    """With rollout.shape=preferences, column of the better response: text, or a conversation that ends with it."""

    rejected_column: str = Field("rejected", min_length=1)
    """As `data.chosen_column`, the worse response."""

    answer_column: str = Field("answer", min_length=1)
    """Column with the reference answer; dots reach into nested columns."""

    answer_after: str | None = Field(None, min_length=1)
    """The answer is what follows this text's last occurrence, `####` for GSM8K; null = the whole column."""

    integer_answers: bool = False
    """Whether every training answer must be an integer; spellings such as `025`, `1,234`, `142.0` count as one."""

    validation_prompt_column: str | None = Field(None, min_length=1)
    """As `data.prompt_column`, for the validation file; null = the same."""

    validation_answer_column: str | None = Field(None, min_length=1)
    """As `data.answer_column`, for the validation file; null = the same."""

    validation_answer_after: str | None = None
    """As `data.answer_after`, for the validation file; null = the same, empty text = the whole column."""

    prompt_template: str | None = Field(None, min_length=1)
    """Text with {prompt} put around every question, or the name `dapo-math`; null = none."""

    drop_duplicates: bool = False
    """Whether a training prompt goes whose question and answer an earlier one has; white space does not matter."""

    drop_conflicts: bool = False
    """Whether all training prompts of a question go whose answers contradict each other."""

    allow_overlap: bool = False
    """Whether validation questions may be trained on; false refuses the run."""

    max_prompt_length: int = Field(2048, ge=1)
    """Longest prompt accepted (tokens); a longer one is refused before training starts."""

    chat_template: bool = False
    """Whether the tokenizer's chat template is applied to prompts."""

    shuffle: bool = True
    """Whether every epoch has a new order; false keeps the file's."""

    generate: ArithmeticTask | None = None
    """A task to generate; its train and validation files are written to the run directory and used. null = none."""
