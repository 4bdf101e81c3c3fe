"""The command line: parse, call, print. Heavy imports wait until a command needs them."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from dapo_megatron.errors import RequestError, exit_with_message

app = typer.Typer(
    name="dapo-megatron",
    help="DAPO and its relatives on a Megatron-style model-parallel learner.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

PREPARED = "DAPO_MEGATRON_PREPARED"  # set by the launcher for the ranks it starts

Overrides = Annotated[list[str] | None, typer.Argument(help="Settings to change: key.sub=value …", show_default=False)]


@app.command()
def train(
    recipe: Annotated[Path | None, typer.Argument(help="Recipe file (YAML).", show_default=False)] = None,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest sound checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in run.directory.")] = False,
    debug_rollout_only: Annotated[
        bool, typer.Option("--debug-rollout-only", help="Save each step's rollouts to RUN/debug/, learn nothing.")
    ] = False,
    debug_train_only: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Learn from saved rollouts (a file or a folder of them).")
    ] = None,
    list_methods: Annotated[
        bool, typer.Option("--list-methods", help="Print what a recipe's algorithm may be made of, and leave.")
    ] = False,
) -> None:
    """Train by a recipe. Starts its own ranks on this machine unless torchrun or srun already did."""
    if list_methods:
        return _print_methods(recipe, overrides or [])
    if recipe is None:
        raise RequestError("train needs a recipe: dapo-megatron train RECIPE")
    if resume and overwrite:
        raise RequestError("--resume and --overwrite exclude each other; give one")
    from dapo_megatron.launch import name_meeting_point, start_ranks, world_from_environment
    from dapo_megatron.stop_signals import hold_notice

    world = world_from_environment()
    if world is not None:
        hold_notice()
    from dapo_megatron.config import load_recipe
    from dapo_megatron.debug_batches import find_batches
    from dapo_megatron.learner.manifest import checkpoint_under_way
    from dapo_megatron.prepare import check_request
    from dapo_megatron.run_directory import claim_run_directory, lay_out_run

    settings = load_recipe(recipe, overrides or [])
    if debug_rollout_only and debug_train_only is not None:
        raise RequestError("--debug-rollout-only and --debug-train-only exclude each other; give one")
    files = tuple(find_batches(debug_train_only)) if debug_train_only is not None else ()
    if settings.learner.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported, here and in the ranks
    if world is not None:
        name_meeting_point()
        from dapo_megatron.learner import megatron_cpu

        megatron_cpu.install()  # before megatron is imported, which it makes quicker
        from dapo_megatron.worker import Mode, run_rank

        mode = Mode(resume, overwrite, PREPARED in os.environ, debug_rollout_only, files)
        _leave(run_rank(settings, world, mode))
    _, layout = check_request(settings)
    claim_run_directory(settings, resume=resume, overwrite=overwrite, needed=files)
    lay_out_run(settings, overwrite=overwrite)
    command = [sys.executable, "-m", "dapo_megatron.cli", "train", str(Path(settings.run.directory) / "config.yaml")]
    command += ["--resume"] if resume else []
    command += ["--debug-rollout-only"] if debug_rollout_only else []
    command += ["--debug-train-only", str(debug_train_only)] if debug_train_only is not None else []
    os.environ[PREPARED] = "1"
    run = Path(settings.run.directory)
    print(f"{settings.run.name}: {layout.world} ranks start on this machine; the run is in {run}", flush=True)
    limits = {"save_limit_s": settings.checkpoint.time_limit_s, "saving": lambda: checkpoint_under_way(run)}
    _leave(start_ranks(command, layout.world, threads=settings.learner.threads, **limits))


def _print_methods(recipe: Path | None, overrides: list[str]) -> None:
    """Those of the recipe's extensions too, where there is one."""
    from dapo_megatron.algorithms.extensions import load_extensions
    from dapo_megatron.config import load_recipe
    from dapo_megatron.methods import list_methods

    if recipe is not None:
        load_extensions(load_recipe(recipe, overrides).algorithm.extensions)
    print(list_methods())


@app.command("check-method")
def check_method(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).", show_default=False)],
    overrides: Overrides = None,
) -> None:
    """Check that a recipe's advantage, policy loss and token selection give one update, however a step is cut."""
    from dapo_megatron import check_method as command
    from dapo_megatron.config import load_recipe

    command.check_method(load_recipe(recipe, overrides or []), print)
    print("the update is the same for every cut")


@app.command()
def plan(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).", show_default=False)],
    overrides: Overrides = None,
    resharding: Annotated[
        bool, typer.Option("--resharding", help="What moving the weights into the engines costs.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    link_gbps: Annotated[
        list[float] | None,
        typer.Option(
            metavar="N", min=1e-3, help="With --resharding: link speed of a rank, Gbit/s each way; may be repeated."
        ),
    ] = None,
    mean_prompt: Annotated[
        float | None, typer.Option(metavar="N", min=1, help="Mean tokens of a prompt.", show_default=False)
    ] = None,
    mean_response: Annotated[
        float | None, typer.Option(metavar="N", min=1, help="Mean tokens of a response.", show_default=False)
    ] = None,
) -> None:
    """Say what a recipe needs and takes, without its weights and without its machines; refuse what does not fit."""
    import json

    from dapo_megatron import plan_command
    from dapo_megatron.config import load_recipe

    settings = load_recipe(recipe, overrides or [])
    if not resharding:
        verdict = plan_command.judge(settings, prompt=mean_prompt, response=mean_response)
        if as_json:
            print(json.dumps(plan_command.verdict_as_json(verdict)))
        elif verdict.plan is not None:
            plan_command.print_run(verdict.plan)
        return verdict.check()
    found = plan_command.plan_resharding(settings)
    speeds = tuple(link_gbps or plan_command.LINK_GBPS)
    if as_json:
        print(json.dumps(plan_command.as_json(found, speeds)))
    else:
        plan_command.print_plan(found, speeds)


@app.command()
def submit(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).", show_default=False)],
    overrides: Overrides = None,
    also: Annotated[
        list[Path] | None,
        typer.Option("--also", metavar="RECIPE", help="One more run of an array job; may be repeated."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write and show the batch file, call no sbatch.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest sound checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in run.directory.")] = False,
) -> None:
    """Write a recipe's batch file for slurm, show it, and submit it."""
    from dapo_megatron import submit_command

    if resume and overwrite:
        raise RequestError("--resume and --overwrite exclude each other; give one")
    recipes = [recipe, *(also or [])]
    submit_command.submit(recipes, overrides or [], print, dry_run=dry_run, resume=resume, overwrite=overwrite)


@app.command()
def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(help="Recipe file (YAML): judge by what it needs.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    parity: Annotated[
        bool, typer.Option("--parity", help="Run layers, kernels, vLLM and a reshard beside their references.")
    ] = False,
    time_limit: Annotated[float, typer.Option(help="Longest time of a part of --parity (seconds).")] = 300.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what this machine has, what is missing and what that costs. Exit code 1 where a run or a part would fail."""
    from dapo_megatron.config import load_recipe

    settings = load_recipe(recipe, overrides or []) if recipe is not None else None
    if parity:
        from dapo_megatron.doctor.parity import check_parity

        _leave(check_parity(settings, recipe and str(recipe), json_wanted=as_json, time_limit_s=time_limit))
    from dapo_megatron.doctor.command import examine

    _leave(examine(settings, recipe and str(recipe), json_wanted=as_json))


@app.command()
def serve(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).", show_default=False)],
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
) -> None:
    """Run one vLLM engine of a recipe in the foreground, for runs that name it in rollout.servers."""
    from dapo_megatron.config import load_recipe
    from dapo_megatron.serve_command import become_engine

    become_engine(load_recipe(recipe, overrides or []), host, port)


@app.command()
def evaluate(
    model: Annotated[
        Path, typer.Option(help="Hugging Face folder, RUN, or RUN/checkpoints/step-NNNNNN.", show_default=False)
    ],
    data: Annotated[Path, typer.Option(help="Problems with reference answers.", show_default=False)],
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(help="Responses a problem, the k of avg@k.")] = 32,
    temperature: Annotated[float, typer.Option(help="Sampling temperature; 0 = greedy.")] = 1.0,
    fork_temperature: Annotated[
        float | None,
        typer.Option(help="Another temperature for tokens above the entropy threshold.", show_default=False),
    ] = None,
    entropy_threshold: Annotated[
        float | None, typer.Option(help="Entropy (nats) that such tokens exceed.", show_default=False)
    ] = None,
    top_p: Annotated[float, typer.Option(help="Nucleus mass to sample from.")] = 0.7,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest response (default: the run's, else 20480).", show_default=False)
    ] = None,
    prompt_column: Annotated[str | None, typer.Option(help="Column with the question.", show_default=False)] = None,
    answer_column: Annotated[str | None, typer.Option(help="Column with the answer.", show_default=False)] = None,
    prompt_template: Annotated[
        str | None, typer.Option(help="Text around the question: see data.prompt_template.", show_default=False)
    ] = None,
    chat_template: Annotated[
        bool | None, typer.Option("--chat-template/--plain", help="Apply the tokenizer's chat template.")
    ] = None,
    max_problems: Annotated[int | None, typer.Option(help="Only the first N problems.", show_default=False)] = None,
    engine: Annotated[str, typer.Option(help="hf or vllm.")] = "hf",
    tensor: Annotated[int, typer.Option(help="Tensor-parallel size of a vllm engine.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    output: Annotated[Path | None, typer.Option(help="JSON lines, one a problem.", show_default=False)] = None,
) -> None:
    """Measure a model: avg@k, pass@k and maj@k on a file of problems. A run's data and reward settings hold for it."""
    import json

    if samples < 1:
        raise RequestError(f"--samples {samples} must be positive; use at least 1")
    if "learner.device=cpu" in (overrides or []):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported
    from dapo_megatron import evaluate_command

    if output is not None:
        evaluate_command.check_output(output, data)
    settings = {
        "data": {
            "validation": str(data),
            "validation_prompt_column": prompt_column,
            "validation_answer_column": answer_column,
            "prompt_template": prompt_template,
            "chat_template": chat_template,
        },
        "rollout": {"engine": engine, "tensor": tensor, "max_response_length": max_tokens},
        "evaluation": {
            "samples": samples,
            "temperature": temperature,
            "fork_temperature": fork_temperature,
            "entropy_threshold": entropy_threshold,
            "top_p": top_p,
            "max_prompts": max_problems,
            "seed": seed,
        },
    }
    found = evaluate_command.evaluate_model(model, settings, overrides or [])
    if output is not None:
        evaluate_command.write_problems(output, found)
    if as_json:
        print(json.dumps(evaluate_command.as_json(found)))
    else:
        evaluate_command.print_scores(found)


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run directories to draw, one over the other.", show_default=False)
    ],
    output: Annotated[Path | None, typer.Option(help="Folder of the report (default: the first run's).")] = None,
) -> None:
    """Draw runs: a PNG and one self-contained HTML page."""
    from dapo_megatron.monitoring import write_report

    for path in write_report(runs, output):
        print(path)


analyze = typer.Typer(help="Look at what a trained model does.", no_args_is_help=True)
app.add_typer(analyze, name="analyze")


@analyze.callback()
def _analyze() -> None:
    """Without it typer would make the one command the group itself."""


@analyze.command("entropy")
def analyze_entropy(
    model: Annotated[
        Path, typer.Argument(help="Hugging Face folder, RUN, or RUN/checkpoints/step-NNNNNN.", show_default=False)
    ],
    overrides: Overrides = None,
    base: Annotated[
        Path | None,
        typer.Option(help="The model before training, as MODEL; scores the same text.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="Prompts to sample for (default: the run's validation).", show_default=False)
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="Recorded responses in the place of samples.", show_default=False)
    ] = None,
    samples: Annotated[int, typer.Option(help="Responses a prompt.")] = 4,
    limit: Annotated[int | None, typer.Option(help="Only the first N rows.", show_default=False)] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Longest response (default: the run's, else 20480).", show_default=False)
    ] = None,
    temperature: Annotated[float, typer.Option(help="Sampling temperature.")] = 1.0,
    prompt_column: Annotated[str | None, typer.Option(help="Column with the question.", show_default=False)] = None,
    answer_column: Annotated[str | None, typer.Option(help="Column with the answer.", show_default=False)] = None,
    chat_template: Annotated[
        bool | None, typer.Option("--chat-template/--plain", help="Apply the tokenizer's chat template.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    ratio: Annotated[float, typer.Option(help="Share of tokens that counts as forking.")] = 0.2,
    bins: Annotated[int, typer.Option(help="Bins of base entropy.")] = 20,
    min_count: Annotated[int, typer.Option(help="Least count of a token in the tables.")] = 10,
    top: Annotated[int, typer.Option(help="Tokens in a table.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    output: Annotated[Path | None, typer.Option(help="The JSON object in a file.", show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option(help="The picture, PNG.", show_default=False)] = None,
) -> None:
    """Token entropies: percentiles, forking tokens, and what training changed beside a base model on the same text."""
    import json

    if samples < 1:
        raise RequestError(f"--samples {samples} must be positive; use at least 1")
    if "learner.device=cpu" in (overrides or []):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported
    from dapo_megatron import analyze_command as command
    from dapo_megatron.files import write_text_atomically

    columns = {"validation_prompt_column": prompt_column, "validation_answer_column": answer_column}
    request = command.EntropyRequest(
        model=model,
        base=base,
        text=text,
        data=data,
        limit=limit,
        ratio=ratio,
        bins=bins,
        least_count=min_count,
        listed=top,
        settings={
            "data": {**columns, "chat_template": chat_template},
            "rollout": {"max_response_length": max_tokens},
            "evaluation": {"samples": samples, "temperature": temperature, "top_p": 1.0, "seed": seed},
        },
        overrides=overrides or [],
    )
    command.check_entropy_request(request, output, plot)
    report = command.analyze_entropy(request)
    if output is not None:
        write_text_atomically(output, json.dumps(report, indent=1) + "\n")
    if plot is not None:
        from dapo_megatron.analysis.entropy_figure import draw_entropy

        draw_entropy(report, plot)
    if as_json:
        print(json.dumps(report))
    else:
        command.print_report(report)


convert = typer.Typer(
    help="Checkpoints between Hugging Face folders and Megatron shards, and from one layout into another.",
    no_args_is_help=True,
)
app.add_typer(convert, name="convert")

HFSource = Annotated[Path, typer.Argument(help="Hugging Face folder.", show_default=False)]
ShardSource = Annotated[
    Path, typer.Argument(help="Checkpoint folder (of a run, or written by convert).", show_default=False)
]
HFDestination = Annotated[Path, typer.Argument(help="Hugging Face folder to write.", show_default=False)]
ShardDestination = Annotated[Path, typer.Argument(help="Checkpoint folder to write.", show_default=False)]
Parallel = Annotated[
    list[str] | None, typer.Argument(help="parallel.tensor=…, parallel.pipeline=…", show_default=False)
]
DType = Annotated[str, typer.Option("--dtype", help="keep, fp32, bf16 or fp16.")]
MaxMemory = Annotated[str, typer.Option(help="Most memory of the process, whatever the model's size.")]
FileSize = Annotated[str, typer.Option(help="Most bytes of weights in a file.")]
Verify = Annotated[bool, typer.Option("--verify/--no-verify", help="Read the result again and compare every byte.")]
AllowLoss = Annotated[bool, typer.Option("--allow-loss", help="Allow a dtype of smaller range.")]


@convert.command("hf-to-megatron")
def hf_to_megatron(
    source: HFSource,
    destination: ShardDestination,
    overrides: Parallel = None,
    dtype: DType = "keep",
    max_memory: MaxMemory = "2GiB",
    verify: Verify = True,
    allow_loss: AllowLoss = False,
) -> None:
    """Hugging Face folder → Megatron sharded checkpoint of the given layout."""
    options = {"dtype": dtype, "max_memory": max_memory, "verify": verify, "allow_loss": allow_loss}
    _convert("hf-to-megatron", source, destination, overrides, options)


@convert.command("megatron-to-hf")
def megatron_to_hf(
    source: ShardSource,
    destination: HFDestination,
    overrides: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,  # any layout is read as it is
    dtype: DType = "keep",
    max_memory: MaxMemory = "2GiB",
    file_size: FileSize = "4GiB",
    verify: Verify = True,
    allow_loss: AllowLoss = False,
    critic: Annotated[bool, typer.Option("--critic", help="The run's critic, as a token classifier.")] = False,
) -> None:
    """Megatron sharded checkpoint of any layout → Hugging Face folder."""
    options = {"dtype": dtype, "max_memory": max_memory, "verify": verify, "allow_loss": allow_loss, "critic": critic}
    _convert("megatron-to-hf", source, destination, overrides, {**options, "file_size": file_size})


@convert.command("hf-to-hf")
def hf_to_hf(
    source: HFSource,
    destination: HFDestination,
    dtype: DType = "keep",
    max_memory: MaxMemory = "2GiB",
    file_size: FileSize = "4GiB",
    verify: Verify = True,
    allow_loss: AllowLoss = False,
) -> None:
    """Hugging Face folder → the same with files of another size or weights of another dtype."""
    options = {"dtype": dtype, "max_memory": max_memory, "verify": verify, "allow_loss": allow_loss}
    _convert("hf-to-hf", source, destination, None, {**options, "file_size": file_size})


@convert.command("megatron-to-megatron")
def megatron_to_megatron(
    source: ShardSource,
    destination: ShardDestination,
    overrides: Parallel = None,
    dtype: DType = "keep",
    max_memory: MaxMemory = "2GiB",
    verify: Verify = True,
    allow_loss: AllowLoss = False,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Leave optimizer state behind.")] = False,
) -> None:
    """Megatron sharded checkpoint → another layout; optimizer state is carried over unless --weights-only."""
    options = {"dtype": dtype, "max_memory": max_memory, "verify": verify, "allow_loss": allow_loss}
    _convert("megatron-to-megatron", source, destination, overrides, {**options, "weights_only": weights_only})


def _convert(kind: str, source: Path, destination: Path, overrides: list[str] | None, settings: dict) -> None:
    from dapo_megatron.conversion.options import Options, check_request, parse_size

    for key in ("max_memory", "file_size"):
        if key in settings:
            settings[key] = parse_size(f"--{key.replace('_', '-')}", settings[key])
    options = Options(**settings)
    check_request(kind, source, destination, overrides or [], options)
    from dapo_megatron.conversion.command import convert as run  # imports torch

    run(kind, source, destination, overrides or [], options)


def _leave(code: int) -> None:
    raise typer.Exit(code)


def main() -> None:
    """Entry point."""
    with exit_with_message():
        app()


if __name__ == "__main__":
    main()
