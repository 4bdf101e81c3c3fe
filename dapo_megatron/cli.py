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
    recipe: Annotated[Path, typer.Argument(help="Recipe file (YAML).", show_default=False)],
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest sound checkpoint.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in run.directory.")] = False,
    debug_rollout_only: Annotated[
        bool, typer.Option("--debug-rollout-only", help="Save each step's rollouts to RUN/debug/, learn nothing.")
    ] = False,
    debug_train_only: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Learn from saved rollouts (a file or a folder of them).")
    ] = None,
) -> None:
    """Train by a recipe. Starts its own ranks on this machine unless torchrun or srun already did."""
    from dapo_megatron.config import load_recipe
    from dapo_megatron.debug_batches import find_batches
    from dapo_megatron.launch import start_ranks, world_from_environment
    from dapo_megatron.prepare import check_request
    from dapo_megatron.run_directory import claim_run_directory, lay_out_run

    settings = load_recipe(recipe, overrides or [])
    if debug_rollout_only and debug_train_only is not None:
        raise RequestError("--debug-rollout-only and --debug-train-only exclude each other; give one")
    files = tuple(find_batches(debug_train_only)) if debug_train_only is not None else ()
    if settings.learner.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported, here and in the ranks
    world = world_from_environment()
    if world is not None:
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
    _leave(start_ranks(command, layout.world, threads=settings.learner.threads))


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


convert = typer.Typer(help="Checkpoints between Hugging Face folders and Megatron shards.", no_args_is_help=True)
app.add_typer(convert, name="convert")


@convert.command("hf-to-megatron")
def hf_to_megatron(
    source: Annotated[Path, typer.Argument(help="Hugging Face folder.", show_default=False)],
    destination: Annotated[Path, typer.Argument(help="Checkpoint folder to write.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="parallel.tensor=…, parallel.pipeline=…", show_default=False)
    ] = None,
) -> None:
    """Hugging Face folder → Megatron sharded checkpoint of the given layout."""
    from dapo_megatron.convert import convert_hf_to_megatron

    _leave(convert_hf_to_megatron(source, destination, overrides or []))


@convert.command("megatron-to-hf")
def megatron_to_hf(
    source: Annotated[
        Path, typer.Argument(help="Checkpoint folder (of a run, or written by hf-to-megatron).", show_default=False)
    ],
    destination: Annotated[Path, typer.Argument(help="Hugging Face folder to write.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="parallel.tensor=… of the reading world", show_default=False)
    ] = None,
) -> None:
    """Megatron sharded checkpoint of any layout → Hugging Face folder."""
    from dapo_megatron.convert import convert_megatron_to_hf

    _leave(convert_megatron_to_hf(source, destination, overrides or []))


def _leave(code: int) -> None:
    raise typer.Exit(code)


def main() -> None:
    """Entry point."""
    with exit_with_message():
        app()


if __name__ == "__main__":
    main()
