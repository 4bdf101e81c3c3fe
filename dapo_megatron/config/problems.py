"""From pydantic's findings to lines for people: the dotted key, the value given, what is expected, the nearest name."""

import difflib
import json
import math
import types
from collections.abc import Iterator, Sequence
from typing import Any, Union, get_args, get_origin

from pydantic import ValidationError

from dapo_megatron.config.section import Section

_TYPES = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text (in quotes if it looks like a number, a date or a truth value)",
    "list_type": "a list",
    "model_type": "a mapping of settings",
    "model_attributes_type": "a mapping of settings",
    "dict_type": "a mapping of settings",
}
_UNITS = {"_s": "seconds", "_mib": "MiB", "_gib": "GiB", "_gb": "GB"}  # by the end of a setting's name
_BOUNDS = {
    "greater_than_equal": ("at least", "ge", True),
    "greater_than": ("more than", "gt", False),
    "less_than_equal": ("at most", "le", True),
    "less_than": ("less than", "lt", False),
    "multiple_of": ("a multiple of", "multiple_of", False),
}


def describe_problems(error: ValidationError, recipe: type[Section]) -> list[str]:
    """One line a problem, in the order of the recipe's keys, e.g. `run.steps="ten": expected a whole number`."""
    return [_describe(details, recipe) for details in error.errors(include_url=False)]


def known_names(section: type[Section]) -> list[str]:
    """Full dotted names of all settings and groups below `section`; entries of lists carry no index."""
    return list(_names(section, ""))


def nearest_name(unknown: str, known: Sequence[str]) -> str | None:
    """The known dotted name most like `unknown`; None if nothing is alike.

    Inside a section its own settings are compared first, then the last parts of all names (`algorithm.temperature` ->
    `rollout.temperature`). A name without a section is compared with last parts and whole names.
    """
    parent, leaf = unknown.rpartition(".")[0], _leaf(unknown)
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    # whole names of one section are alike by their prefix alone, so they count at the top only
    for candidates, cutoff in ((siblings, 0.6), (known, 0.75)) if parent else ((known, 0.6),):
        scores = {}
        for name in candidates:
            whole = _likeness(unknown, name)
            # without a section the shorter of two would win; the recipe's order is nearer to what is meant
            scores[name] = (max(_likeness(leaf, _leaf(name)), 0.0 if parent else whole), whole if parent else 0.0)
        best = max(scores, key=scores.__getitem__, default=None)
        if best is not None and scores[best][0] >= cutoff:
            return best
    return None


def show(value: Any) -> str:
    """`value` as in JSON, or as in Python where JSON has no form for it, on one line of at most 80 characters."""
    try:
        text = json.dumps(value, default=str, ensure_ascii=False)
    except (TypeError, ValueError):  # keys that are no text; a mapping that contains itself
        text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def join_or(words: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b or c`."""
    return " or ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _describe(details: Any, recipe: type[Section]) -> str:
    kind, value, context = details["type"], details["input"], details.get("ctx", {})
    name = _dotted(details["loc"])
    if kind in ("extra_forbidden", "invalid_key"):
        return _unknown(details["loc"], recipe)
    if kind == "missing":
        return f"{name} is missing and has no default"
    if kind == "value_error":  # raised by a section's own rule, which names its fields
        return f"{name}: {context['error']}"
    if kind == "literal_error":
        return f"{name}={show(value)}: expected {context['expected'].replace(chr(39), '')}"
    if kind in _TYPES:
        hint = ""
        if kind == "int_type" and isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
            hint = f"; use {int(value)}"
        if kind in ("int_type", "float_type"):
            hint = next((f" of {unit}" for end, unit in _UNITS.items() if name.endswith(end)), "") + hint
        if kind == "list_type":
            hint = f"; a list is given whole: {name}=[…]"
        return f"{name}={show(value)}: expected {_TYPES[kind]}{hint}"
    if kind in _BOUNDS:
        words, key, attained = _BOUNDS[kind]
        works = context[key] if attained else _within(details["loc"], recipe, value, context[key], key)
        return f"{name}={show(value)}: must be {words} {context[key]}" + ("" if works is None else f"; use {works}")
    if kind in ("too_short", "string_too_short"):
        return f"{name}={show(value)}: must not be empty"
    return f"{name}={show(value)}: {details['msg'][0].lower()}{details['msg'][1:]}"


def _within(place: Sequence[str | int], recipe: type[Section], value: Any, bound: Any, key: str) -> Any:
    """A value that works where the bound itself does not: the next multiple, or the default; None if there is none."""
    if key == "multiple_of":
        return max(1, math.ceil(value / bound)) * bound
    section = recipe
    for part in place[:-1]:
        if isinstance(part, str):  # a list's entries are of one section
            inner = list(_sections_in(section.model_fields[part].annotation))
            if not inner:
                return None
            section = inner[0]
    field = section.model_fields.get(str(place[-1]))
    default = None if field is None else field.default
    return default if isinstance(default, int | float) else None


def _unknown(place: Sequence[str | int], recipe: type[Section]) -> str:
    plain = ".".join(str(part) for part in place if not (isinstance(part, int) and part is not place[-1]))
    known = known_names(recipe)
    name = nearest_name(plain, known)
    if name is not None:
        return f"unknown setting {_dotted(place)}; did you mean {name}?"
    parent = plain.rpartition(".")[0]
    inside = [_leaf(name) for name in known if name.rpartition(".")[0] == parent]
    return f"unknown setting {_dotted(place)}; {parent or 'a recipe'} has {', '.join(inside)}"


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _dotted(place: Sequence[str | int]) -> str:
    name = ""
    for part in place:
        name += f"[{part}]" if isinstance(part, int) else f".{part}"
    return name.removeprefix(".")


def _names(section: type[Section], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield prefix + name
        for inner in _sections_in(field.annotation):
            yield from _names(inner, f"{prefix}{name}.")


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and not get_origin(annotation) and issubclass(annotation, Section):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, list):
        for inner in get_args(annotation):
            yield from _sections_in(inner)
