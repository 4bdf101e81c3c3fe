"""Write docs/recipe.md, the reference of every recipe key, from the typed models of the recipe.

python tools/write_recipe_reference.py            write it
python tools/write_recipe_reference.py --check    exit 1 when the committed file is not up to date
"""

import argparse
import inspect
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from dapo_megatron.config import Recipe
from dapo_megatron.config.section import Section
from dapo_megatron.config.yaml_text import to_yaml
from dapo_megatron.files import write_text_atomically

REFERENCE = Path(__file__).resolve().parents[1] / "docs" / "recipe.md"

WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false"}
BOUNDS = {"ge": "≥ {}", "gt": "> {}", "le": "≤ {}", "lt": "< {}", "multiple_of": "multiple of {}"}

HEADER = """\
# Recipe reference

A recipe is a YAML file of sections. `run` and `model` must be given; every other section has defaults.

This file is written by `python tools/write_recipe_reference.py` from the models in `dapo_megatron/config/`, where the
texts below are the docstrings. Edit those, not this file.

## How a recipe is read

- `base: other.yaml` names another recipe that is read first, relative to the file that names it. Bases may have bases.
- Mappings merge key by key. Everything else, lists and `null` too, is replaced.
- `key.sub=value` on the command line acts as one more file on top, in the order given. The value is read as YAML;
  `key=` gives `null`.
- Types are strict: `"3"`, `3.0` and `true` are not whole numbers. A whole number is accepted for a number. Infinities
  and NaN are refused.
- Unknown keys are refused with the nearest known name.
- Paths are relative to the current working directory, not to the recipe's file.
- The resolved recipe, defaults included, is written to `config.yaml` in the run directory and is itself a recipe.

Sizes that must divide each other are checked in `dapo_megatron/config/derive.py`, other rules between settings in
`dapo_megatron/config/check.py`. All broken rules are told at once, before any rank starts.
"""


def render_reference() -> str:
    """The whole of docs/recipe.md."""
    overview = ["## Sections", "", "| section | about |", "| --- | --- |"]
    overview += [f"| [`{name}`](#{name}) | {_cell(field.description)} |" for name, field in Recipe.model_fields.items()]
    parts = [HEADER, "\n".join(overview) + "\n"]
    for name, field in Recipe.model_fields.items():
        parts += _section(name, next(_sections_in(field.annotation)), level=2)
    return "\n".join(parts)


def _section(name: str, section: type[Section], *, level: int) -> Iterator[str]:
    """Heading, docstring and table of a section, then the same of the sections inside it."""
    lines = [f"{'#' * level} {name}", "", *inspect.getdoc(section).splitlines(), ""]
    lines += ["| key | type | default | bounds | meaning |", "| --- | --- | --- | --- | --- |"]
    inner: list[tuple[str, type[Section]]] = []
    for key, field in section.model_fields.items():
        cells = (_kind(field.annotation), _default(field), _bounds(field), field.description)
        lines.append(f"| `{name}.{key}` | " + " | ".join(_cell(cell) for cell in cells) + " |")
        inner += [(_inner_name(f"{name}.{key}", field), below) for below in _sections_in(field.annotation)]
    yield "\n".join(lines) + "\n"
    for inner_name, below in inner:
        yield from _section(inner_name, below, level=level + 1)


def _inner_name(name: str, field: FieldInfo) -> str:
    return f"{name}[]" if get_origin(field.annotation) is list else name


def _kind(annotation: Any) -> str:
    """A type in words, e.g. `whole number or null`, `hf, vllm`."""
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if origin is Annotated:
        return _kind(get_args(annotation)[0])
    if origin is list:
        return f"list of {_kind(get_args(annotation)[0])}s"
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(part) for part in get_args(annotation))
    if annotation is type(None):
        return "null"
    if issubclass(annotation, Section):
        return "mapping"
    return WORDS[annotation]


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Section):
        return "its own defaults"
    if isinstance(value, str):
        return f"`{value}`"
    if isinstance(value, float):
        return f"`{value:g}`".replace("e-0", "e-")
    return f"`{to_yaml([value]).strip().removeprefix('- ')}`" if not isinstance(value, list) else f"`{value}`"


def _bounds(field: FieldInfo) -> str:
    words = list(_bound_words(field.metadata))
    if get_origin(field.annotation) is list:
        entry = get_args(field.annotation)[0]
        for extra in get_args(entry)[1:] if get_origin(entry) is Annotated else ():
            words += [f"entries {word}" for word in _bound_words(extra.metadata)]
    return ", ".join(words)


def _bound_words(metadata: list[Any]) -> Iterator[str]:
    for constraint in metadata:
        if getattr(constraint, "min_length", None):
            yield "not empty"
        for name, words in BOUNDS.items():
            if getattr(constraint, name, None) is not None:
                yield words.format(f"{getattr(constraint, name):g}")


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if get_origin(annotation) in (Union, types.UnionType, list):
        for part in get_args(annotation):
            yield from _sections_in(part)
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


def main() -> None:
    """Write the reference, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare only")
    check = parser.parse_args().check
    text = render_reference()
    if not check:
        write_text_atomically(REFERENCE, text)
    elif not REFERENCE.is_file() or REFERENCE.read_text(encoding="utf-8") != text:
        sys.exit(f"{REFERENCE} is not up to date; run python tools/write_recipe_reference.py")


if __name__ == "__main__":
    main()
