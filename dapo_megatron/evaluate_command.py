"""`dapo-megatron evaluate`: k samples of every problem of a file by a model, graded; one process, no learner."""

import io
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dapo_megatron.config import Architecture, Recipe, load_recipe, read_architecture
from dapo_megatron.config.check import fork_problems
from dapo_megatron.config.load import build_recipe
from dapo_megatron.data.prompts import Prompt
from dapo_megatron.errors import RequestError
from dapo_megatron.evaluation import Scores, problem_records, sample_problems, score
from dapo_megatron.files import atomic_path
from dapo_megatron.learner.manifest import MANIFEST, newest_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KEPT_SECTIONS = ("data", "reward")  # how a run put its questions and graded the answers holds for its checkpoints too


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation found. `model`: the folder that was evaluated. `failures`: items without a verdict."""

    model: Path
    recipe: Recipe
    scores: Scores
    problems: list[dict[str, Any]]
    failures: int
    seconds: float


@dataclass(frozen=True)
class Problems:
    """What a model is asked: the tokens of each prompt, for its architecture and tokenizer; `stops` end a response."""

    architecture: Architecture
    tokenizer: "PreTrainedTokenizerBase"
    prompts: list[Prompt]
    token_ids: list[np.ndarray]
    stops: set[int]


def find_model(model: Path, option: str = "--model") -> tuple[Path, Path | None, list[str]]:
    """(Hugging Face folder or checkpoint, the run it belongs to, what there is to say) for what an option names.

    A run stands for its newest sound checkpoint, or for RUN/hf where it has none. `option` is for messages.

    Raises:
        RequestError: neither a Hugging Face folder, nor a checkpoint, nor a run with something to evaluate.
    """
    if not model.is_dir():
        raise RequestError(f"{option} {model} is not a folder; give a Hugging Face folder, a run, or RUN/checkpoints/…")
    if (model / MANIFEST).is_file():
        above = model.resolve().parent.parent
        return model, above if (above / "config.yaml").is_file() else None, []
    if (model / "config.json").is_file():
        return model, None, []
    if not (model / "config.yaml").is_file():
        raise RequestError(
            f"{option} {model} has neither config.json (a Hugging Face folder), {MANIFEST} (a checkpoint), nor "
            "config.yaml (a run)"
        )
    newest, lines = newest_checkpoint(model)
    if newest is None and (model / "hf" / "config.json").is_file():
        newest = model / "hf"
    if newest is None:
        raise RequestError("\n".join([*lines, f"{option} {model} is a run without a sound checkpoint"]))
    return newest, model, lines


def evaluation_recipe(
    folder: Path, run: Path | None, settings: Mapping[str, Mapping[str, Any]], overrides: Sequence[str]
) -> Recipe:
    """The recipe of an evaluation: defaults, the `data` and `reward` sections of `run`, `settings`, then `overrides`.

    Raises:
        RequestError: unknown keys, values out of bounds; samples that greedy decoding would make all equal.
    """
    merged: dict[str, dict[str, Any]] = {"run": {"directory": str(run or folder), "steps": 0}}
    if run is not None:
        whole = load_recipe(run / "config.yaml").model_dump()
        merged |= {name: dict(whole[name]) for name in KEPT_SECTIONS}
        merged["data"] |= {"train": None, "generate": None}
        merged["rollout"] = {"max_response_length": whole["rollout"]["max_response_length"]}
    for section, values in settings.items():
        merged[section] = merged.get(section, {}) | {k: v for k, v in values.items() if v is not None}
    merged["model"] = {"path": str(folder)}
    recipe = build_recipe(merged, overrides)
    if problems := list(fork_problems(recipe, ("--fork-temperature", "--entropy-threshold"))):
        raise RequestError("\n".join(problems))
    if not recipe.evaluation.temperature and not recipe.evaluation.fork_temperature and recipe.evaluation.samples > 1:
        raise RequestError(
            f"--temperature 0 decodes greedily: all --samples {recipe.evaluation.samples} of a problem would be equal; "
            "use --samples 1 or a temperature above 0"
        )
    return recipe


def evaluate_model(model: Path, settings: Mapping[str, Mapping[str, Any]], overrides: Sequence[str] = ()) -> Evaluated:
    """Sample and grade; see `evaluation_recipe` for the settings. `data.validation` names the problems.

    Nothing but messages is printed, to standard error.

    Raises:
        RequestError: a model, data file or setting that cannot work.
        RunError: an engine or the grader failed.
    """
    started = time.perf_counter()
    found, run, lines = find_model(model)
    recipe = evaluation_recipe(found, run, settings, overrides)
    for line in lines:
        print(line, file=sys.stderr)
    # vLLM and the conversion talk on standard output, which belongs to the result
    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory(prefix="dapo-evaluate-") as scratch:
        folder = hugging_face_folder(found, Path(scratch))
        groups, failures = _sample(recipe, folder, Path(scratch) / "engines")
    votes = recipe.reward.answers_are_counted
    scores, problems = score(groups, votes=votes), problem_records(groups, votes=votes)
    return Evaluated(found, recipe, scores, problems, failures, time.perf_counter() - started)


def as_json(found: Evaluated) -> dict[str, Any]:
    """The result as one JSON-able object; a standard error of one problem is null, and so is what does not exist."""
    scores, recipe = found.scores, found.recipe
    values = asdict(scores) | {"pass_at_k": scores.pass_at_k, "pass_at": {str(k): p for k, p in scores.pass_at.items()}}
    if math.isnan(scores.standard_error):
        values["standard_error"] = None
    return values | {
        "model": str(found.model),
        "data": recipe.data.validation,
        "temperature": recipe.evaluation.temperature,
        "fork_temperature": recipe.evaluation.fork_temperature,
        "entropy_threshold": recipe.evaluation.entropy_threshold,
        "top_p": recipe.evaluation.top_p,
        "max_tokens": recipe.rollout.max_response_length,
        "seed": recipe.evaluation.seed,
        "engine": recipe.rollout.engine,
        "grader_failures": found.failures,
        "seconds": round(found.seconds, 3),
    }


def print_scores(found: Evaluated) -> None:
    """The result for people."""
    scores, recipe = found.scores, found.recipe
    k, e = scores.samples, recipe.evaluation
    error = "" if math.isnan(scores.standard_error) else f" ± {scores.standard_error:.4f}"
    forks = ""
    if e.fork_temperature is not None:
        forks = f" ({e.fork_temperature:g} above {e.entropy_threshold:g} nats of entropy)"
    answered = "" if scores.answered is None else f"; {scores.answered:.1%} give a final answer"
    rows = [
        ("model", str(found.model)),
        ("data", f"{recipe.data.validation}: {scores.problems} problems, {k} samples each"),
        (
            "sampling",
            f"temperature {e.temperature:g}{forks}, top-p {e.top_p:g}, "
            f"at most {recipe.rollout.max_response_length} tokens",
        ),
        (f"avg@{k}", f"{scores.avg_at_k:.4f}{error}   (standard error over problems)"),
        (f"pass@{k}", f"{scores.pass_at_k:.4f}   (at {', '.join(f'{n}: {p:.4f}' for n, p in scores.pass_at.items())})"),
        (
            f"maj@{k}",
            "none: these responses have no final answers" if scores.maj_at_k is None else f"{scores.maj_at_k:.4f}",
        ),
        ("length", f"mean {scores.length_mean:.1f}, longest {scores.length_max} tokens"),
        ("truncated", f"{scores.truncated_fraction:.1%} of the responses{answered}"),
    ]
    if found.failures:
        rows.append(("grader", f"{found.failures} responses got no verdict and count as wrong"))
    for name, text in rows:
        print(f"{name:<10} {text}")


def check_output(output: Path, data: Path, option: str = "--output", extension: str = ".jsonl") -> None:
    """Refuse a file that could not be written in the end, or that is the data file itself."""
    if output.is_dir():
        raise RequestError(f"{option} {output} is a folder; name a {extension} file")
    if not output.absolute().parent.is_dir():
        raise RequestError(f"{option} {output}: there is no folder {output.absolute().parent}")
    if output.exists() and data.exists() and output.samefile(data):
        raise RequestError(f"{option} {output} is the data file; name another")


def write_problems(output: Path, found: Evaluated) -> None:
    """One JSON line a problem."""
    with atomic_path(output) as temporary:
        temporary.write_text("".join(json.dumps(problem) + "\n" for problem in found.problems), encoding="utf-8")


def hugging_face_folder(found: Path, scratch: Path) -> Path:
    """`found` itself, or the weights of a checkpoint as a Hugging Face folder in `scratch`."""
    if not (found / MANIFEST).is_file():
        return found
    import torch

    from dapo_megatron.conversion.command import convert

    threads = torch.get_num_threads()
    print(f"reading {found} as a Hugging Face folder", file=sys.stderr)
    with redirect_stdout(io.StringIO()):  # what convert says is of a folder that goes when the command ends
        convert("megatron-to-hf", found, scratch / "hf")  # compares the manifest before it parses anything
    torch.set_num_threads(threads)
    return scratch / "hf"


def read_problems(recipe: Recipe, folder: Path) -> Problems:
    """The prompts of `data.validation`, and what the Hugging Face folder and the engine must have to answer them.

    Raises:
        RequestError: a folder, a data file or an engine that cannot work.
    """
    from dapo_megatron.data.tokenizer import load_tokenizer, stop_tokens
    from dapo_megatron.evaluation_engine import check_engine
    from dapo_megatron.prepare import encode_prompts
    from dapo_megatron.resharding.hf_layout import check_checkpoint

    architecture = read_architecture(folder)
    check_checkpoint(folder, architecture)
    check_engine(recipe, architecture)
    tokenizer = load_tokenizer(folder)
    prompts, token_ids, _ = encode_prompts(tokenizer, recipe, Path(recipe.data.validation), "validation")
    _check_fit(recipe, architecture.max_positions, architecture.vocab, token_ids[: recipe.evaluation.max_prompts])
    stops = stop_tokens(architecture.eos_token_ids, tokenizer)
    if not stops:
        raise RequestError(f"{folder}: neither config.json nor the tokenizer names an end-of-sequence token")
    return Problems(architecture, tokenizer, prompts, token_ids, stops)


def engine_for(problems: Problems, recipe: Recipe, folder: Path, logs: Path):
    """As `open_engine`, with room for the prompts that `recipe.evaluation` takes."""
    from dapo_megatron.evaluation_engine import open_engine

    longest = max(map(len, problems.token_ids[: recipe.evaluation.max_prompts]))
    return open_engine(
        recipe, problems.architecture, folder, stop_tokens=problems.stops, longest_prompt=longest, logs=logs
    )


def _sample(recipe: Recipe, folder: Path, logs: Path) -> tuple[list, int]:
    """Graded groups and the number of items without a verdict."""
    from dapo_megatron.judge_assembly import check_judge_engine, judged_by_engine, judging
    from dapo_megatron.prepare import check_answers
    from dapo_megatron.rewards.grader import Grader, check_grader
    from dapo_megatron.rollout.groups import GroupSampler
    from dapo_megatron.rollout.hf_engine import own_device

    check_grader(recipe.reward)
    if judged_by_engine(recipe.reward):
        check_judge_engine(recipe, cpu=own_device().type == "cpu")
    problems = read_problems(recipe, folder)
    check_answers(recipe, problems.prompts, recipe.data.validation)
    with (
        judging(recipe, own_device(), logs) as judge,
        Grader(recipe.reward, own_device(), judge=judge) as grader,
        engine_for(problems, recipe, folder, logs) as dispatcher,
    ):
        sampler = GroupSampler(recipe, problems.tokenizer, problems.prompts, problems.token_ids, dispatcher, grader)
        return sample_problems(sampler, recipe), grader.failures


def _check_fit(recipe: Recipe, positions: int, vocabulary: int, token_ids: Sequence) -> None:
    longest, most = max(map(len, token_ids)), recipe.rollout.max_response_length
    if longest + most > positions:
        room = positions - longest
        advice = f"use --max-tokens {room} or less" if room > 0 else "the prompt alone does not fit"
        raise RequestError(
            f"--max-tokens {most} after the longest prompt of {longest} tokens exceeds the model's {positions} "
            f"positions; {advice}"
        )
    highest = max(int(ids.max()) for ids in token_ids)
    if highest >= vocabulary:
        raise RequestError(
            f"the tokenizer makes the token {highest} and the model has {vocabulary} vocabulary rows; it is not the "
            "model's tokenizer"
        )
