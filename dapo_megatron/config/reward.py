"""Section `reward`: what a response is worth and how it is graded."""

from typing import Literal

from pydantic import Field

from dapo_megatron.config.section import Section


class Overlong(Section):
    """Soft punishment of long responses: 0 up to max_length - cache_length, falling to -1 at max_length."""

    max_length: int | None = Field(None, ge=1)
    """Length with the full punishment of -1 (tokens); null = no punishment."""

    cache_length: int = Field(0, ge=0)
    """Width of the ramp below max_length (tokens); 0 = a step at max_length."""


class Code(Section):
    """Programs graded by test cases: the last fenced code block of a response, and JSON in the answer column."""

    score: Literal["fraction", "all-pass"] = "all-pass"
    """all-pass = `reward.right` for all tests passed, else `reward.wrong`; fraction = between these by the share."""

    time_limit_s: float = Field(6.0, gt=0)
    """Longest time of one test (seconds); after it this test and those behind it count as failed."""

    memory_limit_mib: int = Field(512, ge=64)
    """Most address space of one test (MiB)."""

    max_tests: int = Field(20, ge=1)
    """Most tests a response, those with the longest inputs."""


class RewardModel(Section):
    """Scores by a sequence classifier with one label, on rank 0's device: reward = scale · score, within the bound."""

    path: str | None = Field(None, min_length=1)
    """Folder in Hugging Face form: config.json, safetensors, tokenizer."""

    chat_template: bool = True
    """true = prompt and response as two turns of the tokenizer's chat template; false = as one plain text."""

    max_length: int | None = Field(None, ge=1)
    """Most tokens of prompt and response, of longer ones the end is scored (tokens); null = the model's positions."""

    tokens_per_batch: int = Field(16384, ge=1)
    """Most tokens at a time, padding included (tokens)."""

    scale: float = 1.0
    """Factor of the model's score."""

    bound: float | None = Field(None, gt=0)
    """Rewards are cut to -bound … bound; null = they are not."""

    threshold: float = 0.0
    """A response counts as right, for accuracy and dynamic sampling, where the model's own score is more than this."""


class Reward(Section):
    """Reward = right or wrong by the grader, plus the overlong punishment."""

    right: float = 1.0
    """Reward of a right answer."""

    wrong: float = -1.0
    """Reward of a wrong answer or of none."""

    grader: Literal["rule", "code", "model"] = "rule"
    """rule = the final answer is compared with the reference as an integer, as normalised text, else as mathematics;
    code = test cases; model = a reward model's score."""

    code: Code = Code()
    """How programs are graded (`grader: code`)."""

    model: RewardModel = RewardModel()
    """How a reward model scores (`grader: model`)."""

    custom: str | None = Field(None, min_length=1)
    """FILE.py:FUNCTION, a function (responses, answers, prompts) -> one number each, instead of grader; null = off."""

    custom_bound: float = Field(1000.0, gt=0)
    """Largest absolute reward that `custom` may return."""

    custom_threshold: float = 0.0
    """A response counts as right where `custom` returns more than this."""

    workers: int = Field(1, ge=1)
    """Grader processes."""

    time_limit_s: float = Field(2.0, gt=0)
    """Longest time to grade one response (seconds); after it the response counts as wrong. Rule and custom only."""

    memory_limit_mib: int = Field(1024, ge=64)
    """Most memory to grade one response (MiB of address space); beyond it the response counts as wrong. A program's own
    limit is `code.memory_limit_mib`."""

    shuffle: bool = False
    """Control experiment: rewards are permuted across all responses of the step, so nothing can be learnt."""

    overlong: Overlong = Overlong()
    """Soft punishment of long responses."""

    @property
    def method(self) -> Literal["rule", "custom", "code", "model"]:
        """Who grades: `custom` where it is set, else `grader`."""
        return self.grader if self.custom is None else "custom"

    @property
    def answers_are_counted(self) -> bool:
        """Whether responses end in a final answer on which a majority can vote; programs do not."""
        return self.method in ("rule", "custom")
