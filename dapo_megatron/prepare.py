"""Everything that can be refused is refused here, before any rank starts; then the run directory is laid out. No torch.

RUN/config.yaml     the resolved recipe          RUN/model/    a model made from scratch, if the recipe asks for one
RUN/data/           a generated task, likewise   RUN/checkpoints/, metrics.jsonl, samples.jsonl, report.{html,png}, hf/
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from dapo_megatron.config import (
    Architecture,
    Layout,
    Recipe,
    check_recipe,
    derive_critic_layout,
    derive_layout,
    read_architecture,
)
from dapo_megatron.config.architecture import architecture_from_dict, critic_of
from dapo_megatron.config.check import cpu_engine_problem, profile_problem
from dapo_megatron.config.data import Data
from dapo_megatron.config.derive import derive_engines
from dapo_megatron.config.known_models import KNOWN_MODELS, check_known
from dapo_megatron.config.supervised import GENERATED, Stage
from dapo_megatron.data.arithmetic import build_tokenizer, check_task, longest_example
from dapo_megatron.data.hub import PREFIX
from dapo_megatron.data.preferences import Preference, read_preferences
from dapo_megatron.data.prompt_template import apply_template
from dapo_megatron.data.prompts import Example, Prompt, check_prompt_lengths, encode_prompt, read_supervised
from dapo_megatron.data.rows import check_data_file
from dapo_megatron.data.tokenizer import load_tokenizer, vocabulary_size
from dapo_megatron.errors import RequestError
from dapo_megatron.judge_assembly import check_judge_engine, judged_by_engine
from dapo_megatron.methods import check_methods
from dapo_megatron.monitoring import check_trackers
from dapo_megatron.prompt_files import Side, check_overlap, load_prompts
from dapo_megatron.resharding.hf_layout import check_checkpoint
from dapo_megatron.rewards.code_cases import check_cases
from dapo_megatron.rewards.grader import check_grader
from dapo_megatron.rollout.preference_pairs import EncodedPreference
from dapo_megatron.rollout.vllm_plugin import check_vllm_version
from dapo_megatron.rollout.vllm_secret import VARIABLE as SECRET_VARIABLE
from dapo_megatron.scratch import ARITHMETIC, scratch_config, vocabulary_of

PREFERENCE_COLUMNS = ("prompt_column", "chosen_column", "rejected_column")


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
        name = "preferences" if recipe.rollout.shape == "preferences" else "train"
        train, validation = run / "data" / f"{name}.jsonl", run / "data" / "validation.jsonl"
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
    _collect(problems, lambda: check_methods(recipe))
    if layout is not None and (problem := profile_problem(recipe, layout.world)) is not None:
        problems.append(problem)
    monitoring = recipe.monitoring
    _collect(
        problems,
        lambda: check_trackers(tensorboard=monitoring.tensorboard, wandb=monitoring.wandb, mlflow=monitoring.mlflow),
    )
    _collect(problems, lambda: check_grader(recipe.reward))
    _collect(problems, lambda: _check_critic(recipe, architecture, world))
    _collect(problems, lambda: _check_accelerator(recipe))
    _collect(problems, lambda: _check_engines(recipe, architecture, layout))
    _collect(problems, lambda: _check_judge_engine(recipe))
    if recipe.model.scratch is None:
        _collect(problems, lambda: check_checkpoint(paths.model, architecture))
        _collect(problems, lambda: _check_vocabulary(paths.model, architecture))
    scratch, generated = recipe.model.scratch, recipe.data.generate is not None
    if scratch is not None and generated != (scratch.tokenizer == ARITHMETIC):
        problems.append(
            f"model.scratch.tokenizer={scratch.tokenizer} does not go with the data: {ARITHMETIC} reads the task of "
            "data.generate and nothing else; set data.generate, or name a tokenizer's folder, or set model.path"
        )
    elif generated:
        _collect(problems, lambda: _check_generated(recipe, architecture))
    else:
        _collect(problems, lambda: _check_files(recipe, paths, architecture))
    if problems:
        raise RequestError("\n".join(problems))
    return architecture, layout


def planned_architecture(recipe: Recipe, *, folder_needed: bool = True) -> Architecture:
    """The model's architecture, also of one that is yet to be made.

    `folder_needed`: false takes the published shape that model.architecture names where model.path does not exist.

    Raises:
        RequestError: as `read_architecture`; the folder's model is not the one that model.architecture names.
    """
    scratch, known = recipe.model.scratch, recipe.model.architecture
    if scratch is None:
        if known is not None and not folder_needed and not Path(recipe.model.path).exists():
            return KNOWN_MODELS[known]
        found = read_architecture(Path(recipe.model.path))
        if known is not None:
            check_known(known, found, recipe.model.path)
        return found
    config = scratch_config(scratch, vocabulary=vocabulary_of(scratch), eos_token=0)
    return architecture_from_dict(config, "model.scratch")


def planned_critic(recipe: Recipe, policy: Architecture) -> Architecture | None:
    """The architecture of the recipe's critic, None without one: its folder's, or the policy's with a value head."""
    if recipe.algorithm.advantage != "gae":
        return None
    return critic_of(policy if recipe.critic.path is None else read_architecture(Path(recipe.critic.path)))


def planned_tokenizer(recipe: Recipe):
    """The model's tokenizer, also of one that is yet to be made."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    scratch = recipe.model.scratch
    if scratch is None or scratch.tokenizer != ARITHMETIC:
        return load_tokenizer(recipe.model.path if scratch is None else scratch.tokenizer)
    with TemporaryDirectory() as folder:
        build_tokenizer(Path(folder))
        return load_tokenizer(folder)


def encode_prompts(
    tokenizer, recipe: Recipe, path: Path, side: Side = "train"
) -> tuple[list[Prompt], list[np.ndarray], list[str]]:
    """(prompts, their token ids, lines about repeats) of a data file; refuses prompts longer than
    data.max_prompt_length."""
    data = recipe.data
    prompts, lines = load_prompts(recipe, path, side)
    token_ids = [encode_prompt(tokenizer, prompt, data.chat_template) for prompt in prompts]
    for prompt, ids in zip(prompts, token_ids, strict=True):
        if len(ids) == 0:
            raise RequestError(f"{path} row {prompt.id} (from 0): the prompt has no tokens")
    rows = [prompt.id for prompt in prompts]
    check_prompt_lengths([len(ids) for ids in token_ids], data.max_prompt_length, path, rows)
    return prompts, token_ids, lines


def encode_preferences(tokenizer, recipe: Recipe, path: Path) -> tuple[list[Preference], list[EncodedPreference]]:
    """(preferences, their token ids) of a file of pairs; prompts as rollouts see them, the end of sequence behind each
    response.

    Raises:
        RequestError: as `read_preferences`; a prompt or a response longer than the recipe's; responses of equal tokens.
    """
    data, limit = recipe.data, recipe.rollout.max_response_length
    columns = {name: getattr(Data() if data.generate else data, name) for name in PREFERENCE_COLUMNS}
    preferences = read_preferences(path, **columns)
    if data.prompt_template is not None:
        preferences = [replace(p, prompt=apply_template(p.prompt, data.prompt_template)) for p in preferences]
    prompts = [encode_prompt(tokenizer, p.prompt, data.chat_template) for p in preferences]
    check_prompt_lengths([len(ids) for ids in prompts], data.max_prompt_length, path)
    encoded = []
    for i, (preference, prompt) in enumerate(zip(preferences, prompts, strict=True)):
        pair = [_encode_response(tokenizer, text, path) for text in (preference.chosen, preference.rejected)]
        longest = max(map(len, pair))
        if longest > limit:
            raise RequestError(
                f"{path} row {i} (from 0): a response of {longest} tokens exceeds rollout.max_response_length={limit}; "
                f"use {longest} or more, or drop the row"
            )
        if np.array_equal(*pair):
            raise RequestError(f"{path} row {i} (from 0): both responses have the same tokens; drop the row")
        encoded.append((prompt, *pair))
    return preferences, encoded


def _encode_response(tokenizer, text: str, path: Path) -> np.ndarray:
    if tokenizer.eos_token_id is None:
        raise RequestError(f"{path}: the tokenizer has no end-of-sequence token; responses of a file need one")
    return np.asarray([*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id], np.int32)


def check_answers(recipe: Recipe, prompts: list[Prompt], path: Path | str) -> None:
    """Refuse answers that the recipe's grader cannot use.

    Raises:
        RequestError: with reward.grader=code the first answer that is no test cases.
    """
    if recipe.reward.method == "code":
        check_cases(((prompt.id, prompt.answer) for prompt in prompts), path)


def encode_examples(tokenizer, recipe: Recipe, stage: Stage) -> list[Example]:
    """The examples of a supervised stage; prompts as rollouts see them, the end of sequence behind each response.

    Raises:
        RequestError: a tokenizer without an end of sequence, a prompt without tokens.
    """
    path, data = run_paths(recipe).supervised(stage.data), recipe.data
    examples = []
    columns = {name: getattr(stage, name) for name in ("prompt_column", "response_column", "weight_column")}
    for prompt, response, weight in read_supervised(path, **columns):
        if data.prompt_template is not None:
            prompt = apply_template(prompt, data.prompt_template)
        prompt_ids = encode_prompt(tokenizer, prompt, data.chat_template)
        if len(prompt_ids) == 0:
            raise RequestError(f"{path} row {prompt.id} (from 0): the prompt has no tokens")
        whole = stage.response_template.replace("{response}", response)
        examples.append(Example(prompt_ids, _encode_response(tokenizer, whole, path), weight))
    return examples


def _check_files(recipe: Recipe, paths: RunPaths, architecture: Architecture) -> None:
    """Encode every prompt and example once, so that none is refused in the middle of a run."""
    tokenizer = planned_tokenizer(recipe)
    if tokenizer.eos_token_id is None and not architecture.eos_token_ids:
        raise RequestError(f"{paths.model}: neither config.json nor the tokenizer names an end-of-sequence token")
    sides: list[list[Prompt]] = []
    for side, path in (("train", paths.train), ("validation", paths.validation)):
        if path is not None:
            check_data_file(path, f"data.{side}")
        if path is not None and side == "train" and recipe.rollout.shape == "preferences":
            sides.append([preference.prompt for preference in encode_preferences(tokenizer, recipe, path)[0]])
        elif path is not None:
            sides.append(encode_prompts(tokenizer, recipe, path, side)[0])
            check_answers(recipe, sides[-1], path)
    if len(sides) == 2:
        check_overlap(recipe, *sides)
    for i, stage in enumerate(recipe.supervised.stages):
        if stage.data in GENERATED:
            raise RequestError(f"supervised.stages[{i}].data={stage.data} is made by data.generate, which is not set")
        _check_stage(tokenizer, recipe, i, architecture)


def _check_generated(recipe: Recipe, architecture: Architecture) -> None:
    generate = recipe.data.generate
    check_task(**generate.model_dump())
    prompt, whole = longest_example(generate.terms, generate.operand_max, generate.total_max)
    if prompt > recipe.data.max_prompt_length:
        raise RequestError(
            f"data.max_prompt_length={recipe.data.max_prompt_length} is less than the {prompt} tokens of the longest "
            f"generated question; use {prompt} or more"
        )
    worked = whole - prompt + 1
    if recipe.rollout.shape == "preferences" and worked > recipe.rollout.max_response_length:
        raise RequestError(
            f"rollout.max_response_length={recipe.rollout.max_response_length} is less than the {worked} tokens of the "
            f"longest generated response; use {worked} or more"
        )
    own = [i for i, stage in enumerate(recipe.supervised.stages) if stage.data not in GENERATED]
    if len(own) < len(recipe.supervised.stages):
        _check_example_length(whole, " and ".join(GENERATED), recipe, architecture)
    if not own:
        return
    tokenizer = planned_tokenizer(recipe)
    for i in own:
        _check_stage(tokenizer, recipe, i, architecture)


def _check_stage(tokenizer, recipe: Recipe, number: int, architecture: Architecture) -> None:
    stage, setting = recipe.supervised.stages[number], f"supervised.stages[{number}].data"
    if recipe.data.generate is not None and not Path(stage.data).suffix and not stage.data.startswith(PREFIX):
        raise RequestError(f"{setting}={stage.data}: data.generate makes {' and '.join(GENERATED)}; use one, or a file")
    check_data_file(stage.data, setting)
    examples = encode_examples(tokenizer, recipe, stage)
    _check_example_length(max(len(e.prompt) + len(e.response) for e in examples), stage.data, recipe, architecture)


def _check_example_length(longest: int, data: str, recipe: Recipe, architecture: Architecture) -> None:
    budget = recipe.learner.tokens_per_micro_batch
    if longest > budget:
        raise RequestError(
            f"learner.tokens_per_micro_batch={budget} is less than the {longest} tokens of an example of {data}"
        )
    if longest > architecture.max_positions:
        raise RequestError(
            f"{data}: an example of {longest} tokens exceeds the model's {architecture.max_positions} positions"
        )


def _check_critic(recipe: Recipe, policy: Architecture, world: int | None) -> None:
    """How a critic is cut over the ranks; of one from a folder its files too, vocabulary and positions."""
    path = recipe.critic.path
    if recipe.algorithm.advantage != "gae":
        return
    if path is None:
        if recipe.critic.parallel.changed():  # else it is cut as the policy is
            derive_critic_layout(recipe, planned_critic(recipe, policy), world)
        return
    critic = planned_critic(recipe, policy)
    check_checkpoint(Path(path), critic)
    try:
        derive_critic_layout(recipe, critic, world)
    except RequestError as error:
        raise RequestError(f"critic.path={path}: {error}") from None
    if critic.vocab < policy.vocab:
        raise RequestError(
            f"critic.path={path} has {critic.vocab} vocabulary rows and the policy {policy.vocab}; a critic reads the "
            "policy's tokens: use a model of its tokenizer"
        )
    longest = recipe.data.max_prompt_length + recipe.rollout.max_response_length
    if critic.max_positions < longest:
        raise RequestError(
            f"critic.path={path} has {critic.max_positions} positions; data.max_prompt_length + "
            f"rollout.max_response_length need {longest}"
        )


def _check_accelerator(recipe: Recipe) -> None:
    """What the recipe demands of this machine; torch is imported only where the answer is not known without it."""
    if recipe.learner.device != "cuda" and recipe.model.layer_spec != "transformer_engine":
        return
    from dapo_megatron.learner.distributed import choose_device
    from dapo_megatron.learner.model import choose_layer_spec

    choose_layer_spec(recipe.model.layer_spec, choose_device(recipe.learner.device, 0))


def _check_engines(recipe: Recipe, architecture: Architecture, layout: Layout | None) -> None:
    """vLLM where this run starts it, and engines that it can start; the secret where somebody else did."""
    if recipe.rollout.engine != "vllm":
        return
    cpu = _on_cpu(recipe)
    if layout is not None:
        derive_engines(recipe, layout, cpu=cpu)
    if cpu and (problem := cpu_engine_problem(architecture)):
        raise RequestError(problem)
    if not recipe.rollout.servers:
        check_vllm_version()
    elif not os.environ.get(SECRET_VARIABLE):
        raise RequestError(
            f"rollout.servers names engines that run already; {SECRET_VARIABLE} must hold the secret they were started "
            "with"
        )


def _check_judge_engine(recipe: Recipe) -> None:
    """An engine for the judge that this run can start; a folder that is no judge has been refused already."""
    if not judged_by_engine(recipe.reward) or recipe.reward.judge.url is not None:
        return
    if recipe.reward.judge.model is not None and Path(recipe.reward.judge.model, "config.json").is_file():
        check_judge_engine(recipe, cpu=_on_cpu(recipe))


def _on_cpu(recipe: Recipe) -> bool:
    """Whether the run has no GPU; torch is imported only where the recipe leaves it to the machine."""
    if recipe.learner.device != "auto":
        return recipe.learner.device == "cpu"
    import torch

    return not torch.cuda.is_available()


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
