"""Recorded responses, read from files and made tokens of: a run's samples.jsonl, what `evaluate --output` wrote, and
files alike."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dapo_megatron.analysis.token_entropy import TokenizedText
from dapo_megatron.data.prompts import Prompt, encode_prompt, read_prompt
from dapo_megatron.data.rows import read_rows, shown
from dapo_megatron.errors import RequestError

COLUMNS = ("prompt", "response", "responses", "text")


def read_texts(path: Path, tokenizer, *, chat_template: bool, limit: int | None = None) -> list[TokenizedText]:
    """The responses in the first `limit` rows (None: all) of a .jsonl, .parquet or .json file.

    A row holds `prompt` with `response`, a text, or with `responses`, a list of texts or of {text: …}; or `text` alone,
    whose first token then is the prompt. No end of sequence is added: the text does not say whether there was one.
    A response without tokens is left out.

    Raises:
        RequestError: as `read_rows` and `encode_prompt`; a row without these columns or with values of other types; no
            response with a token in any row.
    """
    texts: list[TokenizedText] = []
    for number, (where, row) in enumerate(read_rows(path, COLUMNS)):
        if limit is not None and number == limit:
            break
        texts += _texts_of(row, where, tokenizer, chat_template)
    texts = [text for text in texts if len(text.response) and len(text.prompt)]
    if not texts:
        raise RequestError(f"{path}: no response has a token; there is nothing to measure")
    return texts


def _texts_of(row: Mapping[str, Any], where: str, tokenizer, chat_template: bool) -> list[TokenizedText]:
    if row.get("prompt") is None and row.get("text") is not None:
        ids = _encoded(tokenizer, row["text"], f"{where}, column text")
        return [TokenizedText(ids[:1], ids[1:])]
    column = "responses" if row.get("responses") is not None else "response"
    if row.get("prompt") is None or row.get(column) is None:
        raise RequestError(f"{where}: a row needs prompt and response, prompt and responses, or text")
    responses = row[column] if column == "responses" else [row[column]]
    if not isinstance(responses, list):
        raise RequestError(f"{where}, column responses: must be a list, not {shown(responses)}")
    text, messages = read_prompt(row["prompt"], f"{where}, column prompt")
    prompt = encode_prompt(tokenizer, Prompt(0, text, "", messages), chat_template)
    values = [value.get("text") if isinstance(value, Mapping) else value for value in responses]
    return [TokenizedText(prompt, _encoded(tokenizer, value, f"{where}, column {column}")) for value in values]


def _encoded(tokenizer, text: Any, where: str) -> np.ndarray:
    if not isinstance(text, str):
        raise RequestError(f"{where}: must be text, not {shown(text)}")
    return np.asarray(tokenizer.encode(text, add_special_tokens=False), np.int32)
