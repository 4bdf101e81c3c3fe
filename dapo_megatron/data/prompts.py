"""Prompts with their reference answers, and supervised pairs, read from jsonl and parquet files."""

import difflib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dapo_megatron.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXTENSIONS = (".jsonl", ".parquet")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """One question.

    id: row number in its file, from 0. text: the prompt as plain text; of a conversation, its contents joined by blank
    lines. answer: the reference. messages: the conversation, None when the file holds plain text.
    """

    id: int
    text: str
    answer: str
    messages: tuple[Message, ...] | None = None


def read_prompts(path: str | Path, *, prompt_column: str, answer_column: str) -> list[Prompt]:
    """All prompts of a .jsonl or .parquet file, in file order.

    A prompt is a string or a list of {role, content}. An answer is a string or a number (142.0 reads as "142"). A
    column inside another is named with dots: "reward_model.ground_truth". Blank lines of a jsonl file are skipped.

    Raises:
        RequestError: missing file, unknown extension, broken row, missing column, a value of the wrong type, an empty
            prompt or answer, no rows at all; the message names file, row and column.
    """
    columns = {"data.prompt_column": prompt_column, "data.answer_column": answer_column}
    prompts: list[Prompt] = []
    for where, row in _rows(Path(path), tuple(columns.values())):
        prompt, answer = (_column(row, name, setting, where) for setting, name in columns.items())
        text, messages = _read_prompt(prompt, f"{where}, column {prompt_column}")
        answer = _read_answer(answer, f"{where}, column {answer_column}")
        prompts.append(Prompt(len(prompts), text, answer, messages))
    if not prompts:
        raise RequestError(f"{path}: the data set is empty; it needs at least 1 prompt")
    return prompts


def read_supervised(path: str | Path) -> list[tuple[str, str]]:
    """(prompt, response) of every row of a .jsonl or .parquet file with these two columns, both text.

    Raises:
        RequestError: as `read_prompts`.
    """
    pairs: list[tuple[str, str]] = []
    for where, row in _rows(Path(path), ("prompt", "response")):
        prompt, response = (_column(row, name, None, where) for name in ("prompt", "response"))
        for name, value in (("prompt", prompt), ("response", response)):
            if not isinstance(value, str) or not value:
                raise RequestError(f"{where}, column {name}: must be a text that is not empty, not {_shown(value)}")
        pairs.append((prompt, response))
    if not pairs:
        raise RequestError(f"{path}: the data set is empty; it needs at least 1 pair of prompt and response")
    return pairs


def encode_prompt(tokenizer: "PreTrainedTokenizerBase", prompt: Prompt, chat_template: bool) -> np.ndarray:
    """Token ids of a prompt, ready for generation: int32 [L].

    With `chat_template` the conversation (plain text becomes one user turn) goes through the tokenizer's template,
    which opens the assistant's turn. Without, `prompt.text` is encoded with what the tokenizer puts before a text (a
    BOS token, if any) and without what it puts after one.

    Raises:
        RequestError: chat_template with a tokenizer that has none or whose template refuses the conversation; a prompt
            without tokens.
    """
    if chat_template:
        if not tokenizer.chat_template:
            raise RequestError("data.chat_template=true, but the tokenizer has no chat template; use false")
        turns = prompt.messages or (Message("user", prompt.text),)
        try:
            text = tokenizer.apply_chat_template(
                [{"role": turn.role, "content": turn.content} for turn in turns],
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # templates are programs and raise what they like
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise RequestError(f"prompt {prompt.id}: the chat template refuses the conversation: {reason}") from error
        ids = tokenizer.encode(text, add_special_tokens=False)
    else:
        ids = tokenizer.encode(prompt.text)
        # a tokenizer may close a text with EOS, which would tell the model that it has ended
        if ids[-1:] == [tokenizer.eos_token_id]:
            bare = tokenizer.encode(prompt.text, add_special_tokens=False)
            ids = ids if bare[-1:] == ids[-1:] else ids[:-1]
    if not ids:
        raise RequestError(f"prompt {prompt.id}: the tokenizer makes no token of {prompt.text[:60]!r}")
    return np.asarray(ids, dtype=np.int32)


def check_prompt_lengths(lengths: Sequence[int] | np.ndarray, limit: int, path: str | Path) -> None:
    """Refuse prompts longer than `limit` tokens; lengths[i] is the length of row i of `path`, in tokens.

    Raises:
        RequestError: naming the first row that is too long, and the limit that would take all.
    """
    lengths = np.asarray(lengths)
    too_long = np.flatnonzero(lengths > limit)
    if too_long.size:
        first = too_long[0]
        raise RequestError(
            f"{path}, row {first} (from 0): the prompt has {lengths[first]} tokens, "
            f"more than data.max_prompt_length={limit}; {too_long.size} of {lengths.size} prompts are longer; "
            f"use at least {lengths.max()} or drop them"
        )


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where, row) for every row; `where` names file and row as a person counts them."""
    if path.suffix not in EXTENSIONS:
        raise RequestError(f"{path}: unknown extension {path.suffix!r}; use {' or '.join(EXTENSIONS)}")
    if not path.is_file():
        raise RequestError(f"{path}: no such file")
    try:
        yield from _jsonl_rows(path) if path.suffix == ".jsonl" else _parquet_rows(path, columns)
    except OSError as error:
        raise RequestError(f"{path}: cannot be read: {error}") from error


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RequestError(f"{where}: not valid JSON: {error}") from error
            if not isinstance(row, dict):
                raise RequestError(f"{where}: must be a JSON object, not {_shown(row)}")
            yield where, row


def _parquet_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            present = file.schema_arrow.names
            wanted = [
                name for name in present if any(name == column or column.startswith(f"{name}.") for column in columns)
            ]
            # without rows no row can show that a column is missing
            if file.metadata.num_rows == 0:
                return
            number = 0
            for batch in file.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    # the columns left unread are still worth naming when one is missing
                    yield f"{path}, row {number} (from 0)", dict.fromkeys(present) | row
                    number += 1
    except pyarrow.ArrowException as error:
        raise RequestError(f"{path}: not a readable parquet file: {str(error).splitlines()[0]}") from error


def _column(row: Mapping[str, Any], name: str, setting: str | None, where: str) -> Any:
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            asked = f"{setting}={name}" if setting else name
            near = difflib.get_close_matches(name, row, n=1)
            advice = f"use {near[0]}" if near else "the row has " + (", ".join(map(str, row)) or "none")
            raise RequestError(f"{where}: no column {asked}; {advice}")
        value = value[part]
    return value


def _read_prompt(value: Any, where: str) -> tuple[str, tuple[Message, ...] | None]:
    if isinstance(value, str):
        messages, text = None, value
    elif isinstance(value, list):
        messages = tuple(_read_message(turn, where) for turn in value)
        text = "\n\n".join(turn.content for turn in messages)
    else:
        raise RequestError(f"{where}: must be text or a list of {{role, content}}, not {_shown(value)}")
    if not text.strip():
        raise RequestError(f"{where}: the prompt is empty")
    return text, messages


def _read_message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
        raise RequestError(f"{where}: each message must be {{role: text, content: text}}, not {_shown(turn)}")
    return Message(turn["role"], turn["content"])


def _read_answer(value: Any, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise RequestError(f"{where}: must be text or a number, not {_shown(value)}")
    if isinstance(value, float):
        # tables write a missing number as NaN
        value = None if not math.isfinite(value) else int(value) if value.is_integer() else value
    answer = "" if value is None else str(value).strip()
    if not answer:
        raise RequestError(f"{where}: no answer")
    return answer


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
