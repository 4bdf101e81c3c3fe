"""Run on two ranks: what rank 0 alone fails at ends both alike."""

from types import SimpleNamespace

import numpy as np
import torch.distributed as dist

from dapo_megatron.agreement import everyone
from dapo_megatron.config import load_recipe
from dapo_megatron.data.prompts import Prompt
from dapo_megatron.errors import RunError
from dapo_megatron.phases import Phases
from dapo_megatron.rollout.groups import GroupSampler
from dapo_megatron.train import save
from tests.command_line import RECIPE
from tests.rollout.scripted import ScriptedEngine


class Tokenizer:
    def batch_decode(self, rows, **_) -> list[str]:
        return ["text" for _ in rows]


class Failing:
    """A grader that says no."""

    def score(self, *_, **__) -> None:
        raise RunError("no verdict")

    def write_records(self) -> None:
        raise RunError("a full disk")


def told(work) -> list[list]:
    """(message, on_every_rank) of each rank's RunError."""
    try:
        work()
    except RunError as error:
        return everyone([str(error), error.on_every_rank], dist.get_world_size())
    return everyone(["", False], dist.get_world_size())


def grading_and_saving(_: dict) -> dict[str, list]:
    calls: list[str] = []
    saved = told(lambda: saving(calls))
    return {"grading": told(grading), "saving": saved, "calls": everyone(calls, dist.get_world_size())}


def saving(calls: list[str]) -> None:
    saver = SimpleNamespace(save=lambda *_: calls.append("save"), wait=lambda: calls.append("wait"))
    grader = Failing() if dist.get_rank() == 0 else None
    world = SimpleNamespace(size=dist.get_world_size())
    parts = {"saver": saver, "grader": grader, "world": world, "surplus": [], "reference": None}
    save(SimpleNamespace(**parts, step=7, state=dict, begins=lambda phase: None, phases=Phases()))


def grading() -> None:
    dispatcher = ScriptedEngine()
    dispatcher.world = dist.get_world_size()
    sampler = GroupSampler(
        load_recipe(RECIPE, []), Tokenizer(), [Prompt(0, "1+1=", "2")], [np.array([3], np.int32)], dispatcher,
        Failing() if dist.get_rank() == 0 else None,
    )  # fmt: skip
    sampler.draw([0], samples=2, temperature=1.0, top_p=1.0, seed_key=(0,))
