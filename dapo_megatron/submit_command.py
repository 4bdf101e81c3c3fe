"""`dapo-megatron submit`: a recipe's batch file, written, shown, and handed to sbatch. No torch."""

import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dapo_megatron.config import Recipe, check_recipe, derive_layout, dump_recipe, load_recipe
from dapo_megatron.config.check import profile_problem
from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.files import write_text_atomically
from dapo_megatron.methods import check_methods
from dapo_megatron.planning.memory import plan_memory
from dapo_megatron.prepare import planned_architecture
from dapo_megatron.run_directory import claim_run_directory
from dapo_megatron.slurm.batch_file import batch_file, slurm_folder
from dapo_megatron.slurm.placement import place_ranks

SBATCH_LIMIT_S = 60.0


@dataclass(frozen=True)
class Submission:
    """What was written: the batch file, its text, and the frozen recipe of each run."""

    path: Path
    text: str
    recipes: tuple[Path, ...]


def submit(
    paths: Sequence[Path],
    overrides: Sequence[str],
    say: Callable[[str], None],
    *,
    dry_run: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> Submission:
    """Write the batch file of a recipe, or of several as an array job, and hand it to sbatch unless `dry_run`.

    The settings are frozen beside it: what is changed in a recipe later does not reach a job that waits or comes back.

    Raises:
        RequestError: whatever `train` would refuse that this machine can know; nodes that do not make the world; no
            sbatch; recipes of an array that ask for different nodes or share a run directory.
        RunError: sbatch refused the job, or did not answer.
    """
    recipes = [load_recipe(path, overrides) for path in paths]
    first = recipes[0]
    for path, recipe in zip(paths, recipes, strict=True):
        if recipe.slurm != first.slurm or place_ranks(recipe) != place_ranks(first):
            raise RequestError(
                f"{path} asks for other nodes than {paths[0]}, and the tasks of an array job are alike; submit it alone"
            )
        for line in _check(recipe, resume=resume, overwrite=overwrite):
            say(line)
    directories = [recipe.run.directory for recipe in recipes]
    if len(set(directories)) < len(directories):
        twice = next(name for name in directories if directories.count(name) > 1)
        raise RequestError(f"two runs of the array write to run.directory={twice}; give each its own")
    if not dry_run and shutil.which("sbatch") is None:
        raise RequestError("there is no sbatch on this machine; submit where slurm is, or use --dry-run")
    folder = slurm_folder(first)
    names = ["recipe.yaml"] if len(recipes) == 1 else [f"recipe-{i}.yaml" for i in range(len(recipes))]
    frozen = tuple(folder / name for name in names)
    command = " ".join(["dapo-megatron submit", *map(str, paths), *overrides])
    text = batch_file(
        first,
        command=command,
        arguments=[[path.as_posix()] for path in frozen],
        directories=directories,
        resume=resume,
        overwrite=overwrite,
    )
    submission = Submission(folder / "submit.sbatch", text, frozen)
    try:
        for path, recipe in zip(frozen, recipes, strict=True):
            write_text_atomically(path, dump_recipe(recipe))
        write_text_atomically(submission.path, text)
    except OSError as error:
        raise RequestError(f"{folder} cannot be written: {error.strerror or error}") from None
    say(text)
    say(f"written: {submission.path}")
    if not dry_run:
        say(_call_sbatch(submission.path))
    return submission


def _check(recipe: Recipe, *, resume: bool, overwrite: bool) -> list[str]:
    """Refuse what the job would refuse; returns what could not be checked here, and what the plan warns of."""
    world = place_ranks(recipe).world
    if (problem := profile_problem(recipe, world)) is not None:
        raise RequestError(problem)
    claim_run_directory(recipe, resume=resume, overwrite=overwrite)
    check_methods(recipe)
    absent = recipe.model.scratch is None and not Path(recipe.model.path).exists()
    if absent and recipe.model.architecture is None:
        return [f"not checked: model.path={recipe.model.path} is not on this machine, the layout is checked by the job"]
    architecture = planned_architecture(recipe, folder_needed=False)
    layout = derive_layout(recipe, architecture, world)
    check_recipe(recipe, architecture)
    # a formula, which no GPU has confirmed, and so no reason to refuse
    told = [f"does not fit, by the plan: {problem}" for problem in plan_memory(recipe, architecture, layout).problems]
    if told:
        told.append("`dapo-megatron plan` with the same settings names the nearest layout that fits")
    if not absent:
        return told
    shape = f"model.architecture={recipe.model.architecture}"
    return [f"model.path={recipe.model.path} is not on this machine: the layout was checked for {shape} alone", *told]


def _call_sbatch(path: Path) -> str:
    try:
        done = subprocess.run(["sbatch", str(path)], capture_output=True, text=True, timeout=SBATCH_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise RunError(f"sbatch did not answer in {SBATCH_LIMIT_S:.0f} s; {path} is written, try it again") from None
    if done.returncode:
        raise RunError(f"sbatch refused {path}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout.strip()
