"""Prompt files → one file to train on: repeats, conflicts, held-out and over-long questions go, answers are integers.

python tools/prepare_prompts.py dapo-math-17k.parquet -o prompts.jsonl --answer-column reward_model.ground_truth \\
    --held-out aime24.parquet --held-out-answer-column reward_model.ground_truth --tokenizer MODEL \\
    --max-prompt-length 1024 --template dapo-math
python tools/prepare_prompts.py math.jsonl -o prompts.jsonl --integerize --url http://localhost:8000/v1 --served NAME
python tools/prepare_prompts.py --help
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dapo_megatron.errors import RequestError, exit_with_message
from dapo_megatron.preparation.command import Columns, Preparation, Rewrite, prepare_prompts
from dapo_megatron.preparation.output import describe_report

INPUTS, LENGTH, OUTPUT = "What is read", "Length", "What is written"
REWRITING = "Answers that are no integers"
KEY_VARIABLE = "OPENAI_API_KEY"


def prepare(
    inputs: Annotated[list[Path], typer.Argument(help="Prompts: .jsonl, .parquet, .json, hub:ORG/NAME[:SPLIT].")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Prepared prompts, .jsonl or .parquet.")],
    report: Annotated[Path | None, typer.Option(help="Counts as JSON; OUTPUT.report.json by default.")] = None,
    prompt_column: Annotated[str, typer.Option(rich_help_panel=INPUTS)] = "prompt",
    answer_column: Annotated[str, typer.Option(help="Dots reach inside.", rich_help_panel=INPUTS)] = "answer",
    answer_after: Annotated[
        str | None, typer.Option(help="The answer follows this text, #### of GSM8K.", rich_help_panel=INPUTS)
    ] = None,
    held_out: Annotated[
        list[Path] | None, typer.Option(help="Evaluation file; may be repeated.", rich_help_panel=INPUTS)
    ] = None,
    held_out_prompt_column: Annotated[str, typer.Option(rich_help_panel=INPUTS)] = "prompt",
    held_out_answer_column: Annotated[str, typer.Option(rich_help_panel=INPUTS)] = "answer",
    tokenizer: Annotated[Path | None, typer.Option(help="Folder with a tokenizer.", rich_help_panel=LENGTH)] = None,
    max_prompt_length: Annotated[
        int | None, typer.Option(min=1, help="Longer prompts go (tokens).", rich_help_panel=LENGTH)
    ] = None,
    template: Annotated[
        str | None, typer.Option(help="As data.prompt_template; counted, not written.", rich_help_panel=LENGTH)
    ] = None,
    chat_template: Annotated[bool, typer.Option("--chat-template", rich_help_panel=LENGTH)] = False,
    keep_answers: Annotated[
        bool, typer.Option("--keep-answers", help="Answers need not be integers and stay.", rich_help_panel=OUTPUT)
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", rich_help_panel=OUTPUT)] = False,
    integerize: Annotated[
        bool,
        typer.Option("--integerize", help="A language model rewrites these questions.", rich_help_panel=REWRITING),
    ] = False,
    url: Annotated[
        str | None,
        typer.Option(
            help=f"OpenAI-compatible server, http://host:port/v1; a key in {KEY_VARIABLE} is sent.",
            rich_help_panel=REWRITING,
        ),
    ] = None,
    served: Annotated[str | None, typer.Option(help="The model's name there.", rich_help_panel=REWRITING)] = None,
    model: Annotated[
        Path | None, typer.Option(help="Hugging Face folder, run here.", rich_help_panel=REWRITING)
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.", rich_help_panel=REWRITING)] = 16,
    reply_time_limit: Annotated[
        float, typer.Option(min=1, help="Of one try at a server (s).", rich_help_panel=REWRITING)
    ] = 300.0,
    max_reply_tokens: Annotated[int, typer.Option(min=1, rich_help_panel=REWRITING)] = 2048,
) -> None:
    """Prepare prompts for training."""
    request = Preparation(
        inputs=tuple(inputs),
        output=output,
        report=report or output.with_name(f"{output.name}.report.json"),
        columns=Columns(prompt_column, answer_column, answer_after),
        held_out=tuple(held_out or ()),
        held_out_columns=Columns(held_out_prompt_column, held_out_answer_column),
        integers=not keep_answers,
        tokenizer=tokenizer,
        max_prompt_length=max_prompt_length,
        template=template,
        chat_template=chat_template,
        overwrite=overwrite,
    )
    rewrite = None
    if integerize:
        if (url is None) == (model is None) or (url is None) != (served is None):
            raise RequestError("--integerize needs --url with --served, or --model FOLDER")
        if keep_answers:
            raise RequestError("--integerize and --keep-answers exclude each other; give one")
        rewrite = _rewriter(output, url, served, model, concurrency, reply_time_limit, max_reply_tokens)
    elif url is not None or model is not None or served is not None:
        raise RequestError("--url, --served and --model belong to --integerize; add it or leave them out")
    for line in describe_report(prepare_prompts(request, rewrite)):
        print(line)
    print(f"prompts: {request.output}\nreport:  {request.report}")


def _rewriter(
    output: Path,
    url: str | None,
    served: str | None,
    model: Path | None,
    concurrency: int,
    time_limit_s: float,
    max_tokens: int,
) -> Rewrite:
    """Rewriting by the model asked for, which is opened when there is something to rewrite."""
    from dapo_megatron.chat_server import ChatServer
    from dapo_megatron.preparation.completers import ChatCompletions, HuggingFaceModel
    from dapo_megatron.preparation.integerize import integerize
    from dapo_megatron.preparation.selection import Item

    server = None
    if url is not None:
        key = os.environ.get(KEY_VARIABLE, "")
        at = ChatServer(url, key, concurrency=concurrency, time_limit_s=time_limit_s)
        server = ChatCompletions(at, served, max_tokens)

    def rewrite(items: Sequence[Item]):
        completer = server or HuggingFaceModel(model, max_tokens=max_tokens)
        return integerize(items, completer, output.with_name(f"{output.name}.journal.jsonl"), tell=print)

    return rewrite


if __name__ == "__main__":
    with exit_with_message():
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(prepare)
        app()
