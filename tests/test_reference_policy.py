"""A resumed run keeps the reference it began with, or says why it cannot. No ranks."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from dapo_megatron.config import dump_recipe, load_recipe
from dapo_megatron.errors import RequestError
from dapo_megatron.files import write_text_atomically
from dapo_megatron.learner.manifest import write_manifest
from dapo_megatron.reference_policy import keep_reference
from dapo_megatron.run_directory import claim_run_directory
from tests.command_line import RECIPE


def kl(coefficient: float, place: str) -> str:
    return f"algorithm.kl={{coefficient: {coefficient}, place: {place}}}"


def begun(run: Path, *overrides: str) -> None:
    run.mkdir()
    write_text_atomically(run / "config.yaml", dump_recipe(load_recipe(RECIPE, [f"run.directory={run}", *overrides])))


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ((0.0, "loss"), (0.1, "loss")),
        ((0.1, "loss"), (0.1, "reward")),
    ],
)
def test_the_kl_term_is_neither_turned_on_nor_moved_by_a_resume(tmp_path, before, now):
    begun(tmp_path / "run", kl(*before))
    recipe = load_recipe(RECIPE, [f"run.directory={tmp_path / 'run'}", kl(*now)])
    with pytest.raises(RequestError, match=f"place={now[1]} differs from coefficient={before[0]}.*only a new run"):
        claim_run_directory(recipe, resume=True, overwrite=False)


@pytest.mark.parametrize("now", [(0.2, "loss"), (0.0, "loss"), (0.0, "reward")])
def test_the_coefficient_may_change_and_become_0(tmp_path, now):
    begun(tmp_path / "run", kl(0.1, "loss"))
    recipe = load_recipe(RECIPE, [f"run.directory={tmp_path / 'run'}", kl(*now)])
    claim_run_directory(recipe, resume=True, overwrite=False)


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [("fixed", "ema", True), ("ema", "periodic", True), ("ema", "fixed", True), ("ema", "ema", False)],
)
def test_how_the_reference_moves_is_not_changed_by_a_resume(tmp_path, before, now, refused):
    begun(tmp_path / "run", kl(0.1, "loss"), f"algorithm.reference.kind={before}")
    settings = [kl(0.2, "loss"), f"algorithm.reference={{kind: {now}, placement: resident}}"]
    recipe = load_recipe(RECIPE, [f"run.directory={tmp_path / 'run'}", *settings])
    if not refused:
        return claim_run_directory(recipe, resume=True, overwrite=False)
    with pytest.raises(RequestError, match=f"kind={now} differs from kind={before}.*use kind={before}"):
        claim_run_directory(recipe, resume=True, overwrite=False)


def stages(*names: str) -> str:
    made = [f"{{data: {name}, steps: 2, batch_sequences: 8, learning_rate: 1.0e-3}}" for name in names]
    return f"supervised.stages=[{', '.join(made)}]"


@pytest.mark.parametrize("before", [(), ("worked",)])
@pytest.mark.parametrize("coefficient", [0.1, 0.0])
def test_a_first_stage_is_not_added_behind_the_reference(tmp_path, before, coefficient):
    begun(tmp_path / "run", kl(coefficient, "loss"), stages(*before))
    settings = [kl(coefficient, "loss"), stages(*before, "mixed")]
    recipe = load_recipe(RECIPE, [f"run.directory={tmp_path / 'run'}", *settings])
    if before or not coefficient:
        return claim_run_directory(recipe, resume=True, overwrite=False)
    with pytest.raises(RequestError, match=r"stages=\['mixed'\] cannot be added.*coefficient=0\.1 measures"):
        claim_run_directory(recipe, resume=True, overwrite=False)


def test_a_reference_that_was_lost_or_damaged_is_told(tmp_path):
    recipe = load_recipe(RECIPE, [f"run.directory={tmp_path}", kl(0.1, "loss")])
    run = SimpleNamespace(
        recipe=recipe,
        paths=SimpleNamespace(run=tmp_path),
        step=3,
        world=SimpleNamespace(rank=0, size=1),
        learner=None,
        resident=None,
    )
    with pytest.raises(RequestError, match=r"algorithm\.kl\.coefficient=0\.1 needs the reference.*use coefficient=0"):
        keep_reference(run)
    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "model.safetensors").write_bytes(b"x")
    write_manifest(tmp_path / "reference")
    (tmp_path / "reference" / "model.safetensors").write_bytes(b"y")
    with pytest.raises(RequestError, match=r"model\.safetensors has changed"):
        keep_reference(run)


def test_without_a_kl_term_there_is_no_reference():
    assert keep_reference(SimpleNamespace(recipe=load_recipe(RECIPE))) is None
