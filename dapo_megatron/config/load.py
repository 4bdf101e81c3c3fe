"""From a recipe's YAML file, its bases and the command line's overrides to one Recipe, and back to YAML."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dapo_megatron.config.problems import describe_problems, show
from dapo_megatron.config.recipe import Recipe
from dapo_megatron.config.yaml_text import parse_yaml, to_yaml
from dapo_megatron.errors import RequestError


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the YAML recipe at `path`.

    `base: other.yaml` in a file names another one, relative to that file, that is read first; bases may have bases.
    Mappings merge key by key, everything else (lists and null too) is replaced. Each override `key.sub=value` acts as
    one more file on top, in order, its value read as YAML (`key=null` and `key=` both give null).

    Paths inside the recipe (run.directory, model.path, data.train, data.validation, data of supervised stages) stay as
    written and are relative to the current working directory.

    Raises RequestError: missing or unreadable file, broken YAML with line and column, a file that is no mapping, a
    cycle of bases, an override without "="; or, all together and one a line, unknown keys with the nearest known name,
    wrong types, values out of bounds, missing settings.
    """
    return build_recipe(_read_with_bases(Path(path), ()), overrides)


def build_recipe(settings: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of `settings` (section → keys) with `key.sub=value` overrides on top; raises as `load_recipe` does."""
    merged = dict(settings)
    for override in overrides:
        merged = _merge(merged, _parse_override(override))
    return _validate(merged)


def dump_recipe(recipe: Recipe) -> str:
    """All settings of `recipe`, defaults included, as YAML; `load_recipe` on it gives an equal recipe."""
    return to_yaml(recipe.model_dump())


def _read_with_bases(path: Path, above: tuple[Path, ...]) -> dict[Any, Any]:
    text = _read_text(path, above)
    real = path.resolve()
    if real in above:
        chain = " -> ".join(str(step) for step in (*above[above.index(real) :], real))
        raise RequestError(f"base: {chain} is a cycle; remove one of these bases")
    settings = parse_yaml(text, str(path))
    if settings is None:
        settings = {}
    if not isinstance(settings, dict):
        raise RequestError(f"{path}: expected a mapping of sections, found {_kind(settings)}")
    if "base" not in settings:
        return settings
    base = settings.pop("base")
    if not isinstance(base, str) or not base:
        raise RequestError(f"{path}: base={show(base)}: expected the path of one YAML file")
    return _merge(_read_with_bases(path.parent / base, (*above, real)), settings)


def _read_text(path: Path, above: tuple[Path, ...]) -> str:
    named = f" (base of {above[-1]})" if above else ""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RequestError(f"no recipe at {path}{named}") from None
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}{named}: byte {error.start} is not UTF-8 text") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"cannot read the recipe {path}{named}: {reason}") from None


def _parse_override(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise RequestError(f"override {override!r} is not of the form key.sub=value, e.g. run.steps=10")
    if names == ["base"]:
        raise RequestError(f"override {override!r}: base can be set in a recipe file only")
    if text.lstrip().startswith("#"):  # what the shell leaves of key="####"
        raise RequestError(f"override {override!r}: a value from # on is a comment; quote it twice: '{key}=\"{text}\"'")
    value = parse_yaml(text, f"override {override!r}")
    for name in reversed(names):
        value = {name: value}
    return value


def _merge(below: Mapping[Any, Any], above: Mapping[Any, Any]) -> dict[Any, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def _validate(settings: dict[Any, Any]) -> Recipe:
    problems = []
    for name, field in Recipe.model_fields.items():
        if name in settings and settings[name] is None:
            problems.append(f"section {name} is empty; give it a setting or remove it")
            settings = {**settings, name: {}}
        if field.is_required():
            # so that the report names the settings that are missing inside, not the section
            settings = {name: {}, **settings}
    try:
        recipe = Recipe.model_validate(settings)
    except ValidationError as error:
        raise RequestError("\n".join(problems + describe_problems(error, Recipe))) from None
    except RecursionError:
        raise RequestError("the recipe holds a mapping that contains itself; remove the YAML alias") from None
    if problems:
        raise RequestError("\n".join(problems))
    return recipe


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list"
    return f"{show(value)}"
