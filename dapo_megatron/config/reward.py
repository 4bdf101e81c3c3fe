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


class Reward(Section):
    """Reward = right or wrong by the grader, plus the overlong punishment."""

    right: float = 1.0
    """Reward of a right answer."""

    wrong: float = -1.0
    """Reward of a wrong answer or of none."""

    grader: Literal["rule"] = "rule"
    """rule = the final answer is compared with the reference as an integer, as normalised text, else as mathematics."""

    custom: str | None = Field(None, min_length=1)
    """FILE.py:FUNCTION, a function (responses, answers, prompts) -> one number each, instead of grader; null = off."""

    custom_bound: float = Field(1000.0, gt=0)
    """Largest absolute reward that `custom` may return."""

    custom_threshold: float = 0.0
    """A response counts as right where `custom` returns more than this."""

    workers: int = Field(1, ge=1)
    """Grader processes."""

    time_limit_s: float = Field(2.0, gt=0)
    """Longest time to grade one response (seconds); after it the response counts as wrong."""

    memory_limit_mib: int = Field(1024, ge=64)
    """Most memory to grade one response (MiB of address space); beyond it the response counts as wrong."""

    shuffle: bool = False
    """Control experiment: rewards are permuted across all responses of the step, so nothing can be learnt."""

    overlong: Overlong = Overlong()
    """Soft punishment of long responses."""
