"""Committed recipes whose task a tool writes, with the task's files in a folder of choice."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dapo_megatron.config import load_recipe
from dapo_megatron.config.yaml_text import to_yaml
from dapo_megatron.files import write_text_atomically
from tools.ladder_table import Rung


def placed_recipes(recipes: Path, rungs: Sequence[Rung], out: Path) -> Path:
    """Write the rungs' recipes to out/recipes, bases included, and return that folder: what lies under
    runs/FOLDER/ in them, FOLDER being the last name of `recipes`, lies under `out`."""
    folder = out / "recipes"
    for rung in rungs:
        settings = load_recipe(recipes / f"{rung.recipe}.yaml").model_dump()
        moved = _moved(settings, f"runs/{recipes.name}/", f"{out}/")
        write_text_atomically(folder / f"{rung.recipe}.yaml", to_yaml(moved))
    return folder


def _moved(value: Any, before: str, after: str) -> Any:
    if isinstance(value, dict):
        return {key: _moved(each, before, after) for key, each in value.items()}
    if isinstance(value, list):
        return [_moved(each, before, after) for each in value]
    if isinstance(value, str) and value.startswith(before):
        return after + value.removeprefix(before)
    return value
