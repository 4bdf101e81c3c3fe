"""`dapo-megatron submit` as a user meets it, with a small script in the place of sbatch."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dapo_megatron.cli import app
from dapo_megatron.config import load_recipe
from dapo_megatron.errors import RequestError, RunError
from tests.command_line import ROOT

GPU = ROOT / "recipes" / "gpu" / "qwen2.5-7b-dapo.yaml"
TINY, LADDER = ROOT / "recipes" / "slurm" / "tiny.yaml", ROOT / "recipes" / "ladder"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A working directory, and no program but bash to be found."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "bash").symlink_to("/bin/bash")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sbatch(folder: Path, body: str) -> None:
    (folder / "bin" / "sbatch").write_text(f"#!/bin/bash\n{body}\n")
    (folder / "bin" / "sbatch").chmod(0o755)


def submit(*arguments: object):
    result = CliRunner().invoke(app, ["submit", *map(str, arguments)])
    if isinstance(result.exception, RequestError | RunError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_dry_run_writes_and_shows_and_calls_nothing(folder):
    output = submit(TINY, "run.directory=out", "run.steps=7", "--dry-run", "--overwrite")
    written = (folder / "out.slurm" / "submit.sbatch").read_text()
    assert written in output and "written: out.slurm/submit.sbatch" in output
    assert "arguments=(out.slurm/recipe.yaml)" in written and "\nmode=--overwrite\n" in written
    frozen = load_recipe(folder / "out.slurm" / "recipe.yaml")
    assert frozen == load_recipe(TINY, ["run.directory=out", "run.steps=7"])
    assert not (folder / "out").exists()


def test_the_file_is_handed_to_sbatch(folder):
    sbatch(folder, 'echo "Submitted batch job 41 of $*"')
    assert "Submitted batch job 41 of out.slurm/submit.sbatch" in submit(TINY, "run.directory=out", "--resume")
    assert "\nmode=--resume\n" in (folder / "out.slurm" / "submit.sbatch").read_text()


def test_what_sbatch_says_is_told(folder):
    sbatch(folder, "echo 'sbatch: error: invalid partition' >&2; exit 1")
    with pytest.raises(RunError, match=r"sbatch refused out.slurm/submit.sbatch: .*invalid partition"):
        submit(TINY, "run.directory=out")


def test_without_sbatch_nothing_is_written(folder):
    with pytest.raises(RequestError, match=r"there is no sbatch on this machine; .*--dry-run"):
        submit(TINY, "run.directory=out")
    assert not (folder / "out.slurm").exists()


def test_several_recipes_are_one_array_job(folder):
    rungs = sorted(LADDER.glob("[0-9]-*.yaml"))
    also = [word for path in rungs[1:] for word in ("--also", path)]
    output = submit(rungs[0], "run.seed=3", *also, "--dry-run")
    assert f"#SBATCH --array=0-{len(rungs) - 1}" in output
    frozen = sorted((folder / "runs" / "ladder" / "1-naive-grpo.slurm").glob("recipe-*.yaml"))
    assert [load_recipe(path) for path in frozen] == [load_recipe(path, ["run.seed=3"]) for path in rungs]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([TINY, "slurm.nodes=3"], "slurm.nodes=3 x slurm.tasks_per_node=1 = 3 ranks, which is not a multiple of 4"),
        ([TINY, "parallel.tensor=8", "slurm.tasks_per_node=16"], "parallel.tensor=8 does not divide"),
        ([TINY, "--also", TINY], "two runs of the array write to run.directory=runs/slurm-tiny"),
        ([TINY, "--also", LADDER / "6-dapo.yaml"], "6-dapo.yaml asks for other nodes than"),
        ([TINY, "--resume", "--overwrite"], "exclude each other"),
        ([GPU, "parallel.tensor=3", "parallel.world=24"], "parallel.tensor=3 does not divide 28 attention heads"),
        ([TINY, "run.directory=bin"], "run.directory=bin exists and is not a run"),
    ],
)
def test_refused_before_anything_is_written(folder, arguments, told):
    with pytest.raises(RequestError, match=told):
        submit(*arguments, "--dry-run")
    assert not list(folder.rglob("*.sbatch"))


def test_a_model_that_is_elsewhere_is_said_to_be_unchecked(folder):
    output = submit(ROOT / "recipes" / "slurm" / "two-nodes.yaml", "--dry-run")
    assert "not checked: model.path=models/Qwen2.5-7B is not on this machine" in output


def test_a_published_model_that_is_elsewhere_is_checked_by_its_shape(folder):
    output = submit(GPU, "--dry-run")
    assert "is not on this machine: the layout was checked for model.architecture=qwen2.5-7b alone" in output
    assert "does not fit" not in output
    output = submit(GPU, "parallel.tensor=1", "parallel.sequence=false", "--dry-run")
    assert "does not fit, by the plan: rollout.gpu_memory_share=0.8 beside the learner's state needs" in output
