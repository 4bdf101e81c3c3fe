"""Which prompts are kept, and why each other one goes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dapo_megatron.data.integers import read_integer
from dapo_megatron.data.prompts import Prompt
from dapo_megatron.data.repeats import find_overlap, find_repeats, repeats_to_drop, short
from dapo_megatron.preparation.answers import exact_integer

REASONS = {
    "conflict": "the question occurs with another answer",
    "duplicate": "an earlier row has this question and answer",
    "overlap": "the question is held out",
    "too long": "more tokens than --max-prompt-length",
    "not an integer": "the answer is no integer",
}
"""Reasons of this module; rewriting has more (`rewriting.py`)."""


@dataclass(frozen=True)
class Item:
    """A prompt on its way. source and row: where it came from, row from 0. original: before answer or question changed.

    rule: how a rewritten answer follows from the original one, as JSON text.
    """

    source: str
    row: int
    prompt: Prompt
    original: Prompt | None = None
    rule: str | None = None


@dataclass(frozen=True)
class Drop:
    """A prompt that goes. reason: a few fixed words; detail: what it was in this case."""

    item: Item
    reason: str
    detail: str


def items_of(source: str | Path, prompts: Sequence[Prompt]) -> list[Item]:
    """Items of one file."""
    return [Item(str(source), prompt.id, prompt) for prompt in prompts]


def respell_integers(items: Sequence[Item]) -> list[Item]:
    """Items whose answer is exactly an integer get it in digits; the others stay as they are."""
    result = []
    for item in items:
        value = exact_integer(item.prompt.answer)
        if value is not None and str(value) != item.prompt.answer:
            item = replace(item, prompt=replace(item.prompt, answer=str(value)), original=item.prompt)
        result.append(item)
    return result


def drop_repeats(items: Sequence[Item], template: str | None) -> tuple[list[Item], list[Drop]]:
    """(kept, dropped): all rows of a question with conflicting answers, and repetitions beyond the first."""
    prompts = [item.prompt for item in items]
    repeats = find_repeats(prompts, template)
    reasons = repeats_to_drop(prompts, repeats, duplicates=True, conflicts=True)
    first = {i: group[0] for group in repeats.groups for i in group}
    drops = []
    for i, reason in sorted(reasons.items()):
        other = items[first[i]]
        if reason == "duplicate":
            told = f"as {other.source} row {other.row}"
        else:
            group = next(group for group in repeats.conflicts if i in group)
            told = "answers " + ", ".join(dict.fromkeys(short(prompts[j].answer) for j in group))
        drops.append(Drop(items[i], reason, told))
    return [item for i, item in enumerate(items) if i not in reasons], drops


def drop_overlap(
    items: Sequence[Item], held_out: Sequence[Item], template: str | None
) -> tuple[list[Item], list[Drop]]:
    """(kept, dropped): questions that occur in `held_out`."""
    pairs = find_overlap([item.prompt for item in items], [item.prompt for item in held_out], template)
    drops = [Drop(items[i], "overlap", f"{held_out[j].source} row {held_out[j].row}") for i, j in pairs]
    gone = {i for i, _ in pairs}
    return [item for i, item in enumerate(items) if i not in gone], drops


def drop_long(
    items: Sequence[Item], count_tokens: Callable[[Prompt], int], limit: int
) -> tuple[list[Item], list[Drop]]:
    """(kept, dropped): prompts of more than `limit` tokens."""
    kept, drops = [], []
    for item in items:
        tokens = count_tokens(item.prompt)
        if tokens > limit:
            drops.append(Drop(item, "too long", f"{tokens} tokens"))
        else:
            kept.append(item)
    return kept, drops


def drop_other_answers(items: Sequence[Item]) -> tuple[list[Item], list[Drop]]:
    """(kept, dropped): answers that are not integers; after `respell_integers`."""
    kept, drops = [], []
    for item in items:
        if read_integer(item.prompt.answer) is None:
            drops.append(Drop(item, "not an integer", f"answer {short(item.prompt.answer)}"))
        else:
            kept.append(item)
    return kept, drops
