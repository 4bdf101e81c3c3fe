"""The prompts of a recipe: read as it asks for, repeats reported and dropped, templates put on. No torch."""

from pathlib import Path
from typing import Literal

from dapo_megatron.config import Recipe
from dapo_megatron.data.prompt_template import apply_template
from dapo_megatron.data.prompts import Prompt, read_prompts
from dapo_megatron.data.repeats import describe_repeats, find_overlap, find_repeats, repeats_to_drop, short
from dapo_megatron.errors import RequestError

Side = Literal["train", "validation"]


def load_prompts(recipe: Recipe, path: Path, side: Side = "train") -> tuple[list[Prompt], list[str]]:
    """(prompts as the model sees them, lines about repeats) of one side of a recipe.

    Prompts that `data.drop_duplicates` and `data.drop_conflicts` name are gone from the training side; ids stay the
    rows of the file. The validation side is taken as it is. A generated task has neither repeats nor a template.

    Raises:
        RequestError: as `read_prompts`; nothing left after dropping; a template that does not fit.
    """
    data = recipe.data
    prompts = _read(recipe, path, side)
    if data.generate is not None:
        return prompts, []
    lines: list[str] = []
    if side == "train":
        repeats = find_repeats(prompts, data.prompt_template)
        gone = repeats_to_drop(prompts, repeats, duplicates=data.drop_duplicates, conflicts=data.drop_conflicts)
        lines = [f"{path}: {line}" for line in describe_repeats(prompts, repeats)]
        if gone:
            counts = {reason: sum(r == reason for r in gone.values()) for reason in ("conflict", "duplicate")}
            told = ", ".join(f"{count} for {reason}" for reason, count in counts.items() if count)
            lines.append(f"{path}: {len(gone)} prompts dropped ({told}), {len(prompts) - len(gone)} kept")
        elif repeats.groups:
            settings = "data.drop_duplicates and data.drop_conflicts" if repeats.conflicts else "data.drop_duplicates"
            lines.append(f"{path}: all prompts are kept; {settings} would drop such rows")
        prompts = [prompt for i, prompt in enumerate(prompts) if i not in gone]
        if not prompts:
            raise RequestError(
                f"{path}: data.drop_conflicts=true leaves no prompt; mend the answers or set it to false"
            )
    if data.prompt_template is not None:
        prompts = [apply_template(prompt, data.prompt_template) for prompt in prompts]
    return prompts, lines


def check_overlap(recipe: Recipe, training: list[Prompt], validation: list[Prompt]) -> None:
    """Refuse validation questions that are trained on, unless `data.allow_overlap` is set.

    Raises:
        RequestError: with the count and the first example.
    """
    if recipe.data.allow_overlap:
        return
    pairs = find_overlap(training, validation, recipe.data.prompt_template)
    if pairs:
        first, second = training[pairs[0][0]], validation[pairs[0][1]]
        raise RequestError(
            f"data.validation={recipe.data.validation} overlaps data.train={recipe.data.train}: {len(pairs)} training "
            f"prompts are validation questions too, first row {first.id} = validation row {second.id} (from 0), "
            f"{short(second.text)!r}; drop them (tools/prepare_prompts.py --held-out) or set data.allow_overlap=true"
        )


def _read(recipe: Recipe, path: Path, side: Side) -> list[Prompt]:
    data = recipe.data
    if data.generate is not None:
        return read_prompts(path, prompt_column="prompt", answer_column="answer")
    if side == "train":
        return read_prompts(
            path,
            prompt_column=data.prompt_column,
            answer_column=data.answer_column,
            answer_after=data.answer_after,
            integer_answers=data.integer_answers,
        )
    after = data.validation_answer_after
    return read_prompts(
        path,
        prompt_column=data.validation_prompt_column or data.prompt_column,
        answer_column=data.validation_answer_column or data.answer_column,
        answer_after=data.answer_after if after is None else after,
    )
