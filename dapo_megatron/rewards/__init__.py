"""Rewards: graders, soft overlong punishment, and the worker pool that grades under limits of time and memory."""

from dapo_megatron.rewards.grading import grade
from dapo_megatron.rewards.overlong import overlong_penalty
from dapo_megatron.rewards.rule import extract_answer

__all__ = ["extract_answer", "grade", "overlong_penalty"]
