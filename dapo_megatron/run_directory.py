"""The run directory: claimed for one run, laid out whole or left as it was.

RUN/config.yaml     the resolved recipe          RUN/model/    a model made from scratch, if the recipe asks for one
RUN/data/           a generated task, likewise   RUN/checkpoints/, metrics.jsonl, samples.jsonl, report.{html,png}, hf/
RUN/critic/         a critic, beside hf/
RUN/reference/      the policy after supervised stages, where `algorithm.kl` or `policy_loss: dpo` needs it and the
                    reference stays fixed; one that moves is in the checkpoints
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

from dapo_megatron.config import Recipe, dump_recipe, load_recipe
from dapo_megatron.config.supervised import GENERATED
from dapo_megatron.data.arithmetic import generate_task
from dapo_megatron.errors import RequestError
from dapo_megatron.files import write_text_atomically
from dapo_megatron.prepare import RunPaths, run_paths
from dapo_megatron.scratch import ARITHMETIC, build_scratch_model


def claim_run_directory(recipe: Recipe, *, resume: bool, overwrite: bool, needed: Sequence[Path] = ()) -> None:
    """Refuse a directory that this run may not have; changes nothing.

    Raises:
        RequestError: the directory holds a run and neither `resume` nor `overwrite` is given, or is not a run's at all;
            `overwrite` would delete what the request itself reads (model, data, `needed` files); `resume` would go on
            with another model, task or seed than it began with.
    """
    run = Path(recipe.run.directory)
    if not run.exists():
        return
    if not run.is_dir():
        raise RequestError(f"run.directory={run} is not a directory; choose another")
    if all(path.name.startswith(".") and path.suffix == ".tmp" for path in run.iterdir()):
        return  # empty, or killed before its first file had a name
    if not (run / "config.yaml").is_file():
        raise RequestError(f"run.directory={run} exists and is not a run; choose a new or empty directory")
    if resume:
        _check_same_start(recipe, run)
    elif not overwrite:
        raise RequestError(
            f"run.directory={run} already holds a run; continue it with --resume, replace it with --overwrite, "
            "or choose another directory"
        )
    else:
        _check_nothing_needed_inside(run, [*_inputs(recipe, run_paths(recipe)), *needed])


def lay_out_run(recipe: Recipe, *, overwrite: bool = False) -> None:
    """Create the run directory with the resolved recipe, the generated task and the model made from scratch.

    With `overwrite` an earlier run is set aside first, and deleted only when the new one is laid out.

    Raises:
        RequestError: the directory cannot be written, or the task cannot be made as asked for.
    """
    run = Path(recipe.run.directory)
    aside = run.with_name(f".{run.name}.replaced")
    replacing = overwrite and run.exists()
    try:
        if replacing:
            shutil.rmtree(aside, ignore_errors=True)
            run.rename(aside)
        fresh = not run.exists()
        try:
            _write(recipe, run_paths(recipe))
        except BaseException:
            if fresh:
                shutil.rmtree(run, ignore_errors=True)
            if replacing:
                aside.rename(run)
            raise
    except OSError as error:
        raise RequestError(f"run.directory={run} cannot be written: {error.strerror or error}") from None
    if replacing:
        shutil.rmtree(aside)


def _write(recipe: Recipe, paths: RunPaths) -> None:
    # config.yaml first: it marks the directory as a run's, also if this is interrupted
    write_text_atomically(paths.run / "config.yaml", dump_recipe(recipe))
    generate = recipe.data.generate
    if generate is not None and not (paths.run / "data" / "mixed.jsonl").is_file():
        generate_task(paths.run / "data", **generate.model_dump(), seed=recipe.run.seed)
    if recipe.model.scratch is not None and not (paths.model / "model.safetensors").is_file():
        build_scratch_model(paths.model, recipe.model.scratch, seed=recipe.run.seed)


def _inputs(recipe: Recipe, paths: RunPaths) -> list[Path]:
    """Files and folders outside the run directory's own that the request reads."""
    scratch = recipe.model.scratch
    inputs = [paths.model] if scratch is None else [] if scratch.tokenizer == ARITHMETIC else [Path(scratch.tokenizer)]
    if recipe.data.generate is None:
        inputs += [path for path in (paths.train, paths.validation) if path is not None]
    if recipe.critic.path is not None:
        inputs.append(Path(recipe.critic.path))
    stages = recipe.supervised.stages
    return inputs + [paths.supervised(stage.data) for stage in stages if stage.data not in GENERATED]


def _check_nothing_needed_inside(run: Path, needed: Sequence[Path]) -> None:
    inside = [path for path in needed if run.resolve() in (path.resolve(), *path.resolve().parents)]
    if inside:
        raise RequestError(
            f"--overwrite would delete {inside[0]}, which this request reads; choose another run.directory"
        )


def _check_same_start(recipe: Recipe, run: Path) -> None:
    """What cannot change in the middle of a run."""
    begun = load_recipe(run / "config.yaml")
    problems = []
    for name, old, new in (
        ("run.seed", begun.run.seed, recipe.run.seed),
        ("model", begun.model, recipe.model),
        ("data", begun.data, recipe.data),
    ):
        if old != new:
            problems.append(f"{name} differs from the run's own in {run / 'config.yaml'}; only a new run may change it")
    before, now = begun.supervised.stages, recipe.supervised.stages
    if now[: len(before)] != before:
        problems.append(
            f"supervised.stages differ from those in {run / 'config.yaml'}; --resume may only add stages behind them"
        )
    kl_before, kl_now = begun.algorithm.kl, recipe.algorithm.kl
    if kl_now.coefficient > 0 and (kl_before.coefficient == 0 or kl_before.place != kl_now.place):
        problems.append(
            f"algorithm.kl.coefficient={kl_now.coefficient} in algorithm.kl.place={kl_now.place} differs from "
            f"coefficient={kl_before.coefficient} in place={kl_before.place} in {run / 'config.yaml'}; only a new run "
            "may turn the KL term on or move it; use those, or coefficient=0"
        )
    kind_before, kind_now = begun.algorithm.reference.kind, recipe.algorithm.reference.kind
    if recipe.algorithm.needs_reference and begun.algorithm.needs_reference and kind_now != kind_before:
        problems.append(
            f"algorithm.reference.kind={kind_now} differs from kind={kind_before} in {run / 'config.yaml'}, by which "
            f"the reference has come to where it is; only a new run may change it, use kind={kind_before}"
        )
    if recipe.algorithm.compares_pairs and not begun.algorithm.needs_reference:
        problems.append(
            f"algorithm.policy_loss=dpo measures from the policy before the first rollout step, which this run did not "
            f"keep: by {run / 'config.yaml'} it had policy_loss={begun.algorithm.policy_loss}; only a new run may turn "
            "to dpo"
        )
    if recipe.algorithm.needs_reference and now and not before:
        asks = f"algorithm.kl.coefficient={kl_now.coefficient}" if kl_now.coefficient else "algorithm.policy_loss=dpo"
        problems.append(
            f"supervised.stages={[stage.data for stage in now]} cannot be added to this run: "
            f"{asks} measures from the policy before the first rollout step, "
            f"and by {run / 'config.yaml'} that had no supervised stages; use supervised.stages=[]"
            f"{', or coefficient=0' if kl_now.coefficient else ''}"
        )
    if recipe.algorithm.advantage == "gae" and (
        begun.algorithm.advantage != "gae" or begun.critic.path != recipe.critic.path
    ):
        problems.append(
            f"algorithm.advantage=gae with critic.path={recipe.critic.path} differs from advantage="
            f"{begun.algorithm.advantage} with critic.path={begun.critic.path} in {run / 'config.yaml'}; only a new "
            "run may begin with another critic"
        )
    if problems:
        raise RequestError("\n".join(problems))
