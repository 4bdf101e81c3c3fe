"""Everything that can be refused is refused here, before any rank starts; then the run directory is laid out. No torch.

RUN/config.yaml     the resolved recipe          RUN/model/    a model made from scratch, if the recipe asks for one
RUN/data/           a generated task, likewise   RUN/checkpoints/, metrics.jsonl, samples.jsonl, report.{html,png}, hf/
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dapo_megatron.config import (
    Architecture,
    Layout,
    Recipe,
    check_recipe,
    derive_layout,
    dump_recipe,
    read_architecture,
)
from dapo_megatron.config.architecture import architecture_from_dict
from dapo_megatron.data.arithmetic import generate_task
from dapo_megatron.data.prompts import check_prompt_lengths, encode_prompt, read_prompts, read_supervised
from dapo_megatron.data.tokenizer import load_tokenizer, vocabulary_size
from dapo_megatron.errors import RequestError
from dapo_megatron.files import write_text_atomically
from dapo_megatron.monitoring import check_trackers
from dapo_megatron.resharding.hf_layout import check_checkpoint
from dapo_megatron.scratch import build_scratch_model, scratch_config

GENERATED = ("worked", "mixed")  # supervised sets that `data.generate` writes


@dataclass(frozen=True)
class RunPaths:
    """Where a run's files lie: those the recipe names, or those made into the run directory."""

    run: Path
    model: Path
    train: Path | None
    validation: Path | None

    def supervised(self, data: str) -> Path:
        """The file of a supervised stage."""
        return self.run / "data" / f"{data}.jsonl" if data in GENERATED else Path(data)


def run_paths(recipe: Recipe) -> RunPaths:
    """Derive all paths of a recipe."""
    run = Path(recipe.run.directory)
    if recipe.data.generate is not None:
        train, validation = run / "data" / "train.jsonl", run / "data" / "validation.jsonl"
    else:
        train = None if recipe.data.train is None else Path(recipe.data.train)
        validation = None if recipe.data.validation is None else Path(recipe.data.validation)
    return RunPaths(run, run / "model" if recipe.model.scratch else Path(recipe.model.path), train, validation)


def check_request(recipe: Recipe, world: int | None = None) -> tuple[Architecture, Layout]:
    """Check sizes, model folder, tokenizer and data of a recipe; writes nothing.

    Raises:
        RequestError: whatever is wrong, all problems of a kind together, one a line.
    """
    paths = run_paths(recipe)
    architecture = planned_architecture(recipe)
    problems: list[str] = []
    layout = _collect(problems, lambda: derive_layout(recipe, architecture, world))
    _collect(problems, lambda: check_recipe(recipe, architecture))
    monitoring = recipe.monitoring
    _collect(
        problems,
        lambda: check_trackers(tensorboard=monitoring.tensorboard, wandb=monitoring.wandb, mlflow=monitoring.mlflow),
    )
    _collect(problems, lambda: _check_accelerator(recipe))
    if recipe.model.scratch is None:
        _collect(problems, lambda: check_checkpoint(paths.model, architecture))
        _collect(problems, lambda: _check_vocabulary(paths.model, architecture))
    if recipe.data.generate is None:
        _collect(problems, lambda: _check_prompt_files(recipe, paths))
    for i, stage in enumerate(recipe.supervised.stages):
        if stage.data in GENERATED and recipe.data.generate is not None:
            continue
        if stage.data in GENERATED:
            problems.append(f"supervised.stages[{i}].data={stage.data} is made by data.generate, which is not set")
        else:
            _collect(problems, lambda stage=stage: read_supervised(stage.data))
    if problems:
        raise RequestError("\n".join(problems))
    return architecture, layout


def planned_architecture(recipe: Recipe) -> Architecture:
    """The model's architecture, also of one that is yet to be made."""
    scratch = recipe.model.scratch
    if scratch is None:
        return read_architecture(Path(recipe.model.path))
    return architecture_from_dict(scratch_config(scratch, vocabulary=1, eos_token=0), "model.scratch")


def claim_run_directory(recipe: Recipe, *, resume: bool, overwrite: bool, needed: Sequence[Path] = ()) -> None:
    """Refuse a directory that holds another run, or clear it when told to.

    Raises:
        RequestError: it holds a run and neither `resume` nor `overwrite` is given, it is not a run's directory at all,
            or `needed` files (rollouts to learn from) lie in it and would be cleared.
    """
    run = Path(recipe.run.directory)
    if resume or not run.exists() or not any(run.iterdir()):
        return
    is_run = (run / "config.yaml").is_file()
    if not is_run:
        raise RequestError(f"run.directory={run} exists and is not a run; choose a new or empty directory")
    if not overwrite:
        raise RequestError(
            f"run.directory={run} already holds a run; continue it with --resume, replace it with --overwrite, "
            "or choose another directory"
        )
    inside = [file for file in needed if run.resolve() in file.resolve().parents]
    if inside:
        raise RequestError(
            f"--overwrite would delete {inside[0]}, which is to be learned from; choose another run.directory"
        )
    shutil.rmtree(run)


def lay_out_run(recipe: Recipe) -> None:
    """Create the run directory with the resolved recipe, the generated task and the model made from scratch."""
    paths = run_paths(recipe)
    generate = recipe.data.generate
    if generate is not None and not (paths.run / "data" / "mixed.jsonl").is_file():
        generate_task(paths.run / "data", **generate.model_dump(), seed=recipe.run.seed)
    if recipe.model.scratch is not None and not (paths.model / "model.safetensors").is_file():
        build_scratch_model(paths.model, recipe.model.scratch, seed=recipe.run.seed)
    write_text_atomically(paths.run / "config.yaml", dump_recipe(recipe))


def encode_prompts(tokenizer, recipe: Recipe, path: Path) -> tuple[list, list[np.ndarray]]:
    """(prompts, their token ids) of a data file; refuses prompts longer than data.max_prompt_length."""
    data = recipe.data
    generated = data.generate is not None
    prompts = read_prompts(
        path,
        prompt_column="prompt" if generated else data.prompt_column,
        answer_column="answer" if generated else data.answer_column,
    )
    token_ids = [encode_prompt(tokenizer, prompt, data.chat_template) for prompt in prompts]
    for prompt, ids in zip(prompts, token_ids, strict=True):
        if len(ids) == 0:
            raise RequestError(f"{path} row {prompt.id} (from 0): the prompt has no tokens")
    check_prompt_lengths([len(ids) for ids in token_ids], data.max_prompt_length, path)
    return prompts, token_ids


def _check_prompt_files(recipe: Recipe, paths: RunPaths) -> None:
    files = [path for path in (paths.train, paths.validation) if path is not None]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    tokenizer = load_tokenizer(paths.model)
    for path in files:
        encode_prompts(tokenizer, recipe, path)


def _check_accelerator(recipe: Recipe) -> None:
    """What the recipe demands of this machine; torch is imported only where the answer is not known without it."""
    if recipe.learner.device == "auto" and recipe.model.layer_spec != "transformer_engine":
        return
    from dapo_megatron.learner.distributed import choose_device
    from dapo_megatron.learner.model import choose_layer_spec

    choose_layer_spec(recipe.model.layer_spec, choose_device(recipe.learner.device, 0))


def _check_vocabulary(model: Path, architecture: Architecture) -> None:
    size = vocabulary_size(model)
    if size > architecture.vocab:
        raise RequestError(
            f"{model}: the tokenizer has ids up to {size - 1} and the model {architecture.vocab} vocabulary rows; "
            f"vocab_size must be at least {size}"
        )


def _collect(problems: list[str], check: Callable):
    try:
        return check()
    except RequestError as error:
        problems.append(str(error))
        return None
