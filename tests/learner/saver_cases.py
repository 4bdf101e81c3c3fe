"""Run on ranks: checkpoints written beside training, a disk that fills up, what is kept."""

import errno
import random
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from dapo_megatron.config.checkpoint import Checkpoint
from dapo_megatron.config.optimizer import Optimizer
from dapo_megatron.errors import RunError
from dapo_megatron.learner import checkpoint_saver
from dapo_megatron.learner.checkpoint import load_checkpoint
from dapo_megatron.learner.checkpoint_files import load_surplus, random_states_file
from dapo_megatron.learner.checkpoint_saver import CheckpointSaver
from dapo_megatron.learner.learner import Learner
from dapo_megatron.learner.manifest import POLICY, checkpoint_folder, newest_checkpoint
from dapo_megatron.learner.parallel_groups import groups_in_force
from dapo_megatron.learner.random_states import read_random_states, restore_random_states
from tests.data.test_group_files import group
from tests.learner.batches import load_batch
from tests.learner.checkpoint_cases import _update
from tests.learner.layouts import build

SETTINGS = {"learning_rate": 1e-3, "weight_decay": 0.1, "gradient_clip": 0.5}


def save_beside_training(payload: dict) -> dict:
    """On 2 ranks, sharded by tensor (bf16, distributed optimizer) and by data; see the keys of the answer."""
    batch, out = load_batch(payload["batch"]), Path(payload["out"])
    found = {}
    for name, layout, dtype, distributed in (
        ("bf16", "tp2pp1", torch.bfloat16, True),
        ("data", "tp1pp1", torch.float32, True),
        ("plain", "tp2pp1", torch.float32, False),
    ):
        settings = Optimizer(distributed=distributed, **SETTINGS)

        def make(settings=settings, layout=layout, dtype=dtype) -> Learner:
            return build(payload["model"], layout, budget=150, train=settings, temperature=0.9, dtype=dtype)

        learner, run = make(), out / name
        saver = CheckpointSaver(Checkpoint(keep=1), learner, run, side_files=Path(payload["model"]))
        _update(learner, batch)
        with _held_back() as go_on:
            saver.save(_state(1, updates=1), [group(0, [3, 1], scored=True)])
            expected = _weights(learner)
            norm = _update(learner, batch)
            saver.check()
            found[f"{name} does not wait"] = _all(not checkpoint_folder(run, 1).exists())
            go_on.set()
            saver.wait()
        loaded = make()
        load_checkpoint(checkpoint_folder(run, 1), loaded)
        same = all(torch.equal(tensor, expected[key]) for key, tensor in _weights(loaded).items())
        found[f"{name} is of the moment"] = _all(same)
        found[f"{name} continues exactly"] = _all(_update(loaded, batch) == norm)
        found[f"{name} weights after"] = _all(
            all(torch.equal(tensor, _weights(learner)[key]) for key, tensor in _weights(loaded).items())
        )
        if name == "data":  # whose ranks gather the optimizer's shards while they save
            (out / "blocked").mkdir(exist_ok=True)
            (out / "blocked" / "checkpoints").touch()
            blocked = CheckpointSaver(Checkpoint(), learner, out / "blocked", side_files=Path(payload["model"]))
            with _told_of_gathering() as gathered:
                found["nowhere to write"] = _told_on_every_rank(blocked, _state(1))
            found["none gathers alone"] = _all(not gathered)
    found["surplus"] = [g.step for g in load_surplus(checkpoint_folder(run, 1))]
    found["random"] = _random_states_come_back(random_states_file(checkpoint_folder(run, 1), dist.get_rank()))
    found |= _keep_and_fail(learner, saver, out / "plain", Path(payload["model"]))
    return found


@contextmanager
def _held_back() -> Iterator[threading.Event]:
    """Threads that write checkpoints begin once the event is set."""
    go_on, write = threading.Event(), checkpoint_saver.write_checkpoint

    def write_then(*arguments: object) -> None:
        assert go_on.wait(300)  # an update lies between
        write(*arguments)

    checkpoint_saver.write_checkpoint = write_then
    try:
        yield go_on
    finally:
        checkpoint_saver.write_checkpoint = write


def _keep_and_fail(learner: Learner, saver: CheckpointSaver, run: Path, side_files: Path) -> dict:
    best = {"step": 1, "accuracy": 0.5}
    for step in (2, 3):
        saver.save(_state(step, best=best))
    saver.wait()
    found = {"kept": _names(run)}
    before = (checkpoint_folder(run, 3) / "manifest.json").stat().st_mtime_ns
    saver.save(_state(3, best=best))
    saver.wait()
    found["saved once"] = (checkpoint_folder(run, 3) / "manifest.json").stat().st_mtime_ns == before
    for failing, asynchronous in ((1, True), (0, True), (1, False)):
        saver = CheckpointSaver(Checkpoint(keep=1, asynchronous=asynchronous), learner, run, side_files=side_files)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == failing:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # as a full disk: a write fails half-way
        found[f"full on {failing}, {asynchronous}"] = _told_on_every_rank(saver, _state(4, best=best))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    found["left"] = [_names(run), newest_checkpoint(run)[0].name]
    saver.save(_state(4, best=best))
    saver.wait()
    found["then"] = [_names(run), newest_checkpoint(run)[0].name]
    with _undeletable():
        found["not deleted"] = [_told_on_every_rank(saver, _state(5, best=best)), newest_checkpoint(run)[0].name]
    return found


def _told_on_every_rank(saver: CheckpointSaver, state: dict) -> list[str]:
    """What each rank hears of a save."""
    told = "saved"
    try:
        saver.save(state)
        saver.wait()
    except RunError as error:
        told = str(error) if error.on_every_rank else "not on every rank"
    everyone: list = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, told)
    return everyone


@contextmanager
def _told_of_gathering() -> Iterator[list]:
    """Not empty once this rank gathers state: without rank 0 it would wait, or leave its message to a later save."""
    take, gathered = checkpoint_saver.take_snapshot, []
    checkpoint_saver.take_snapshot = lambda *_: lambda: gathered.append(True) or {}
    try:
        yield gathered
    finally:
        checkpoint_saver.take_snapshot = take


@contextmanager
def _undeletable() -> Iterator[None]:
    """Older checkpoints cannot be deleted."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "step-000001")

    prune, checkpoint_saver.prune = checkpoint_saver.prune, refuse
    try:
        yield
    finally:
        checkpoint_saver.prune = prune


def _random_states_come_back(path: Path) -> bool:
    states = read_random_states(path)
    drawn = []
    for _ in range(2):
        restore_random_states(states, torch.device("cpu"), {POLICY: groups_in_force()})
        drawn.append([torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.randn(), random.random()])
    return _all(drawn[0] == drawn[1] and torch.rand(3).tolist() != drawn[0][0])


def _state(step: int, updates: int = 1, best: dict | None = None) -> dict:
    return {"step": step, "updates": updates, "best": best}


def _weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {key: tensor.clone() for key, tensor in learner.weights.items()}


def _all(value: bool) -> bool:
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return all(values)


def _names(run: Path) -> list[str]:
    dist.barrier()
    return sorted(path.name for path in (run / "checkpoints").iterdir() if path.is_dir())
