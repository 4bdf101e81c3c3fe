"""Prompts with their reference answers, and supervised pairs, read from jsonl, parquet and json files."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dapo_megatron.data.integers import read_integer
from dapo_megatron.data.rows import pick_column, read_rows, shown
from dapo_megatron.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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

    @property
    def question(self) -> str:
        """The last user turn; `text` where there is none."""
        turns = [turn.content for turn in self.messages or () if turn.role == "user"]
        return turns[-1] if turns else self.text


@dataclass(frozen=True)
class Example:
    """A worked example: prompt and response token ids int32, and the weight of the response's tokens in the loss."""

    prompt: np.ndarray
    response: np.ndarray
    weight: float = 1.0


def read_prompts(
    path: str | Path,
    *,
    prompt_column: str,
    answer_column: str,
    answer_after: str | None = None,
    integer_answers: bool = False,
) -> list[Prompt]:
    """All prompts of a .jsonl, .parquet or .json file or of a hub name (`data/hub.py`), in file order.

    A prompt is a string or a list of {role, content}, also one written as JSON text. An answer is a string or a number
    (142.0 reads as "142"). A column inside another is named with dots: "reward_model.ground_truth". Blank lines of a
    jsonl file are skipped.

    Args:
        answer_after: the answer is what follows this text's last occurrence, "####" for GSM8K; None = all of it.
        integer_answers: refuse answers that are not integers, as `read_integer` reads them.

    Raises:
        RequestError: missing file, unknown extension, broken row, missing column, a value of the wrong type, an empty
            prompt or answer, a missing mark, an answer that is no integer where it must be, no rows at all; the
            message names file, row and column.
    """
    columns = {"data.prompt_column": prompt_column, "data.answer_column": answer_column}
    prompts: list[Prompt] = []
    for where, row in read_rows(path, tuple(columns.values())):
        prompt, answer = (pick_column(row, name, setting, where) for setting, name in columns.items())
        text, messages = read_prompt(prompt, f"{where}, column {prompt_column}")
        answer = _read_answer(answer, answer_after, f"{where}, column {answer_column}")
        if integer_answers and read_integer(answer) is None:
            raise RequestError(
                f"{where}, column {answer_column}: the answer {shown(answer)} is not an integer, and "
                "data.integer_answers=true; drop or rewrite the row (tools/prepare_prompts.py), or set it to false"
            )
        prompts.append(Prompt(len(prompts), text, answer, messages))
    if not prompts:
        raise RequestError(f"{path}: the data set is empty; it needs at least 1 prompt")
    return prompts


def read_supervised(
    path: str | Path,
    *,
    prompt_column: str = "prompt",
    response_column: str = "response",
    weight_column: str | None = None,
) -> list[tuple[Prompt, str, float]]:
    """(prompt, response, weight) of every row of a file that `read_prompts` could read; the response is a text.

    Args:
        weight_column: numbers more than 0; None = all weights are 1.

    Raises:
        RequestError: as `read_prompts`; a weight that is none.
    """
    pairs: list[tuple[Prompt, str, float]] = []
    columns = (prompt_column, response_column, *([weight_column] if weight_column else []))
    for where, row in read_rows(path, columns):
        prompt, response = (pick_column(row, name, None, where) for name in (prompt_column, response_column))
        text, messages = read_prompt(prompt, f"{where}, column {prompt_column}")
        if not isinstance(response, str) or not response:
            raise RequestError(
                f"{where}, column {response_column}: must be a text that is not empty, not {shown(response)}"
            )
        weight = 1.0
        if weight_column is not None:
            weight = _read_weight(pick_column(row, weight_column, None, where), f"{where}, column {weight_column}")
        pairs.append((Prompt(len(pairs), text, "", messages), response, weight))
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


def check_prompt_lengths(
    lengths: Sequence[int] | np.ndarray, limit: int, path: str | Path, rows: Sequence[int] | None = None
) -> None:
    """Refuse prompts longer than `limit` tokens; lengths[i], in tokens, is of row rows[i] of `path` (None: row i).

    Raises:
        RequestError: naming the first row that is too long, and the limit that would take all.
    """
    lengths = np.asarray(lengths)
    too_long = np.flatnonzero(lengths > limit)
    if too_long.size:
        first = too_long[0]
        raise RequestError(
            f"{path}, row {first if rows is None else rows[first]} (from 0): the prompt has {lengths[first]} tokens, "
            f"more than data.max_prompt_length={limit}; {too_long.size} of {lengths.size} prompts are longer; "
            f"use at least {lengths.max()} or drop them"
        )


def read_prompt(value: Any, where: str) -> tuple[str, tuple[Message, ...] | None]:
    """(text, conversation or None) of a prompt column's value, a text or a list of {role, content}.

    Raises:
        RequestError: it is neither, or empty; `where` names it.
    """
    if isinstance(value, str):
        value = _turns(value) or value
    if isinstance(value, str):
        messages, text = None, value
    elif isinstance(value, list):
        messages = tuple(_read_message(turn, where) for turn in value)
        text = "\n\n".join(turn.content for turn in messages)
    else:
        raise RequestError(f"{where}: must be text or a list of {{role, content}}, not {shown(value)}")
    if not text.strip():
        raise RequestError(f"{where}: the prompt is empty")
    return text, messages


def _turns(text: str) -> list[Any] | None:
    """The conversation that a text is the JSON of, None for any other text."""
    if not text.lstrip().startswith("["):
        return None
    try:
        turns = json.loads(text)
    except (ValueError, RecursionError):
        return None
    ours = isinstance(turns, list) and all(
        isinstance(turn, dict) and {"role", "content"} <= set(turn) for turn in turns
    )
    return turns if ours else None


def _read_message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
        raise RequestError(f"{where}: each message must be {{role: text, content: text}}, not {shown(turn)}")
    return Message(turn["role"], turn["content"])


def _read_weight(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
        raise RequestError(f"{where}: a weight must be a finite number more than 0, not {shown(value)}")
    return float(value)


def _read_answer(value: Any, after: str | None, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float | None):
        raise RequestError(f"{where}: must be text or a number, not {shown(value)}")
    if isinstance(value, float):
        # tables write a missing number as NaN
        value = None if not math.isfinite(value) else int(value) if value.is_integer() else value
    answer = "" if value is None else str(value).strip()
    if after and answer:
        _, mark, answer = answer.rpartition(after)
        if not mark:
            raise RequestError(f"{where}: no {after!r} in the answer, which data.answer_after asks for")
        answer = answer.strip()
    if not answer:
        raise RequestError(f"{where}: no answer")
    return answer
