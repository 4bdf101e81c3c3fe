"""Rewards: the rule grader, soft overlong punishment, and the worker pool that grades under a time limit."""

from dapo_megatron.rewards.overlong import overlong_penalty
from dapo_megatron.rewards.rule import extract_answer, grade

__all__ = ["extract_answer", "grade", "overlong_penalty"]
