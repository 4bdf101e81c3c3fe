"""The preparation of prompt files as one run: check, read, select, rewrite where asked for, write, report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dapo_megatron.data.prompt_template import apply_template, template_text
from dapo_megatron.data.prompts import Prompt, encode_prompt, read_prompts
from dapo_megatron.errors import RequestError
from dapo_megatron.preparation.output import OUTPUTS, report_of, write_items, write_report
from dapo_megatron.preparation.selection import (
    Drop,
    Item,
    drop_long,
    drop_other_answers,
    drop_overlap,
    drop_repeats,
    items_of,
    respell_integers,
)


@dataclass(frozen=True)
class Columns:
    """How a file is read; see `data.prompts.read_prompts`."""

    prompt: str = "prompt"
    answer: str = "answer"
    answer_after: str | None = None


@dataclass(frozen=True)
class Preparation:
    """What is asked for.

    held_out: files whose questions must not be trained on. tokenizer, max_prompt_length: prompts of more tokens go;
    counted with `template` and, if set, the tokenizer's chat template. integers: every answer must become an integer.
    """

    inputs: tuple[Path, ...]
    output: Path
    report: Path
    columns: Columns = field(default_factory=Columns)
    held_out: tuple[Path, ...] = ()
    held_out_columns: Columns = field(default_factory=Columns)
    integers: bool = True
    tokenizer: Path | None = None
    max_prompt_length: int | None = None
    template: str | None = None
    chat_template: bool = False
    overwrite: bool = False


Rewrite = Callable[[Sequence[Item]], tuple[list[Item], list[Drop], dict[str, Any]]]
"""Items whose answer is no integer → (rewritten, dropped, what to report)."""


def prepare_prompts(request: Preparation, rewrite: Rewrite | None = None) -> dict[str, Any]:
    """Write `request.output` and `request.report`; returns the report (`output.report_of`).

    The questions are written as they were read: templates are for comparing and counting only. Rewritten questions
    pass all checks again.

    Raises:
        RequestError: a file that cannot be read, an output that is there already or is an input, a setting that lacks
            its partner.
        RunError: as `rewrite`.
    """
    _check(request)
    count_tokens = _token_counter(request)
    items, inputs = _read(request.inputs, request.columns)
    held_out, _ = _read(request.held_out, request.held_out_columns)
    drops: list[Drop] = []
    details: dict[str, Any] = {}
    if request.integers:
        items = respell_integers(items)
    items = _checked(request, items, held_out, count_tokens, drops)
    if request.integers:
        items, others = drop_other_answers(items)
        if rewrite is None:
            drops += others
        else:
            rewritten, dropped, details = rewrite([drop.item for drop in others])
            drops += dropped
            items = sorted([*items, *rewritten], key=lambda item: (list(inputs).index(item.source), item.row))
            items = _checked(request, items, held_out, count_tokens, drops)
    report = report_of(inputs, items, drops, details)
    write_items(request.output, items)
    write_report(request.report, report)
    return report


def _checked(
    request: Preparation,
    items: list[Item],
    held_out: Sequence[Item],
    count_tokens: Callable[[Prompt], int] | None,
    drops: list[Drop],
) -> list[Item]:
    items, dropped = drop_repeats(items, request.template)
    drops += dropped
    items, dropped = drop_overlap(items, held_out, request.template)
    drops += dropped
    if count_tokens is not None:
        items, dropped = drop_long(items, count_tokens, request.max_prompt_length)
        drops += dropped
    return items


def _check(request: Preparation) -> None:
    if request.output.suffix not in OUTPUTS:
        raise RequestError(f"{request.output}: unknown extension; the output must be {' or '.join(OUTPUTS)}")
    read = {path.resolve() for path in (*request.inputs, *request.held_out)}
    for path in (request.output, request.report):
        if path.resolve() in read:
            raise RequestError(f"{path} is read by this request; write to another file")
        if path.exists() and not request.overwrite:
            raise RequestError(f"{path} exists; choose another name or allow --overwrite")
    if len({str(path) for path in request.inputs}) < len(request.inputs):
        raise RequestError("an input file is named twice; name each once")
    if (request.tokenizer is None) != (request.max_prompt_length is None):
        raise RequestError("--tokenizer and --max-prompt-length go together: tokens are counted by a tokenizer")
    if request.chat_template and request.tokenizer is None:
        raise RequestError("--chat-template needs --tokenizer, whose template it is")
    if request.template is not None:
        template_text(request.template)


def _read(paths: Sequence[Path], columns: Columns) -> tuple[list[Item], dict[str, int]]:
    items: list[Item] = []
    rows: dict[str, int] = {}
    for path in paths:
        prompts = read_prompts(
            path, prompt_column=columns.prompt, answer_column=columns.answer, answer_after=columns.answer_after
        )
        rows[str(path)] = len(prompts)
        items += items_of(path, prompts)
    return items, rows


def _token_counter(request: Preparation) -> Callable[[Prompt], int] | None:
    if request.tokenizer is None:
        return None
    from dapo_megatron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(request.tokenizer)

    def count(prompt: Prompt) -> int:
        dressed = prompt if request.template is None else apply_template(prompt, request.template)
        return len(encode_prompt(tokenizer, dressed, request.chat_template))

    return count
