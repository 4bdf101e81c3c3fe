"""Preference files: prompts with two responses, one chosen over the other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dapo_megatron.data.prompts import Prompt, read_prompt
from dapo_megatron.data.rows import pick_column, read_rows, shown
from dapo_megatron.errors import RequestError


@dataclass(frozen=True)
class Preference:
    """A prompt (its `answer` is empty) and the texts of two different responses to it."""

    prompt: Prompt
    chosen: str
    rejected: str


def read_preferences(
    path: str | Path, *, prompt_column: str, chosen_column: str, rejected_column: str
) -> list[Preference]:
    """All rows of a file of the kinds that `read_prompts` takes, in file order; dots reach into nested columns.

    A response is a text, or a conversation, a list of {role, content}, of which it is the last turn.

    Raises:
        RequestError: as `read_prompts`; an empty response; two responses of the same text.
    """
    columns = {"data.prompt_column": prompt_column}
    columns |= {"data.chosen_column": chosen_column, "data.rejected_column": rejected_column}
    preferences: list[Preference] = []
    for where, row in read_rows(path, tuple(columns.values())):
        prompt, chosen, rejected = (pick_column(row, name, setting, where) for setting, name in columns.items())
        text, messages = read_prompt(prompt, f"{where}, column {prompt_column}")
        chosen = _read_response(chosen, f"{where}, column {chosen_column}")
        rejected = _read_response(rejected, f"{where}, column {rejected_column}")
        if chosen == rejected:
            raise RequestError(
                f"{where}: {chosen_column} and {rejected_column} are the same text {shown(chosen)}, which prefers "
                "nothing; drop the row"
            )
        preferences.append(Preference(Prompt(len(preferences), text, "", messages), chosen, rejected))
    if not preferences:
        raise RequestError(f"{path}: the data set is empty; it needs at least 1 pair of responses")
    return preferences


def _read_response(value: Any, where: str) -> str:
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    if not isinstance(value, str) or not value.strip():
        raise RequestError(
            f"{where}: a response must be a text that is not empty, or a list of {{role, content}} that ends with it, "
            f"not {shown(value)}"
        )
    return value
