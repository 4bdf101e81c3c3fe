"""Test cases of programming problems, as public data sets write them into the answer column.

    {"inputs": [...], "outputs": [...], "fn_name": ...}              APPS, TACO
    [{"input": ..., "output": ..., "fn_name": ...}, ...]             DeepCoder, LiveCodeBench (metadata.func_name,
                                                                     metadata also as a text with that in JSON)

Without a function, input and output are texts (or lists of lines) for standard input and output. With one, an input
is the list of arguments, or a text with one JSON value a line; an output is what the function returns, in the second
form also as a text with that in JSON.
"""

import json
import math
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from dapo_megatron.errors import RequestError

RELATIVE, ABSOLUTE = 1e-6, 1e-9  # how far floating-point numbers may differ

_CALLS = {"testtype": "functional", "type": "function_call"}  # marks of a case that calls a function
_DECIMAL = re.compile(r"[+-]?(?:[0-9]{1,300}\.[0-9]{0,300}|\.[0-9]{1,300}|[0-9]{1,300})(?:[eE][+-]?[0-9]{1,3})?")


@dataclass(frozen=True)
class TestCases:
    """Inputs and outputs of equal number, at least one: texts, or argument lists and results of `function`."""

    __test__ = False  # no class of tests

    inputs: tuple[Any, ...]
    outputs: tuple[Any, ...]
    function: str | None

    def hardest(self, most: int) -> "TestCases":
        """At most `most` cases, those with the longest inputs, in their order: short ones stand in many questions."""
        if len(self.inputs) <= most:
            return self
        sizes = [len(value) if isinstance(value, str) else len(json.dumps(value)) for value in self.inputs]
        kept = sorted(sorted(range(len(sizes)), key=lambda i: -sizes[i])[:most])
        return TestCases(tuple(self.inputs[i] for i in kept), tuple(self.outputs[i] for i in kept), self.function)


def read_cases(answer: str) -> TestCases:
    """The test cases of an answer column.

    Raises:
        ValueError: what is wrong, as the rest of a sentence that begins with "the answer".
    """
    try:
        read = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    if isinstance(read, list):
        inputs, outputs, function = _of_list(read)
    elif isinstance(read, dict) and all(isinstance(read.get(key), list) for key in ("inputs", "outputs")):
        inputs, outputs, function = read["inputs"], read["outputs"], read.get("fn_name")
    else:
        raise ValueError('is neither {"inputs": [...], "outputs": [...]} nor [{"input": ..., "output": ...}, ...]')
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"has {len(inputs)} inputs and {len(outputs)} outputs; it needs one or more, as many of each")
    if function is not None and not (isinstance(function, str) and function.isidentifier()):
        raise ValueError(f"has fn_name={function!r}, which is no name of a function")
    if function is None:
        return TestCases(
            tuple(_text(value, f"input {i}") for i, value in enumerate(inputs)),
            tuple(_text(value, f"output {i}") for i, value in enumerate(outputs)),
            None,
        )
    arguments = tuple(_arguments(value, i) for i, value in enumerate(inputs))
    return TestCases(arguments, tuple(map(_result, outputs) if isinstance(read, list) else outputs), function)


def check_cases(answers: Iterable[tuple[int, str]], path: Path | str) -> None:
    """Refuse a data file with answers that are no test cases; `answers` are (row, answer).

    Raises:
        RequestError: the first such row.
    """
    for row, answer in answers:
        try:
            read_cases(answer)
        except ValueError as error:
            raise RequestError(
                f"{path} row {row} (from 0): with reward.grader=code the answer {error}; mend or drop the row, or use "
                "reward.grader=rule"
            ) from None


def same_output(given: str, expected: str) -> bool:
    """Whether two outputs agree line by line, without white space at the ends of lines and empty lines at the end.

    Lines that differ agree if they have the same words but for numbers. An expected number with a point or an exponent
    may be missed by RELATIVE or ABSOLUTE; an integer only be written with a point or an exponent.
    """
    lines, expected_lines = _lines(given), _lines(expected)
    return len(lines) == len(expected_lines) and all(map(_same_line, lines, expected_lines))


def same_result(given: Any, expected: Any) -> bool:
    """Whether two JSON values are equal, to RELATIVE or ABSOLUTE where a floating-point number is expected, exactly
    where an integer is; true is not 1."""
    if isinstance(given, bool) or isinstance(expected, bool):
        return given is expected
    if isinstance(given, int | float) and isinstance(expected, int | float):
        return _close(given, expected) if isinstance(expected, float) else given == expected
    if isinstance(given, list) and isinstance(expected, list):
        return len(given) == len(expected) and all(map(same_result, given, expected))
    if isinstance(given, dict) and isinstance(expected, dict):
        return given.keys() == expected.keys() and all(same_result(given[key], expected[key]) for key in given)
    return type(given) is type(expected) and given == expected


def _of_list(cases: list[Any]) -> tuple[list[Any], list[Any], Any]:
    functions = []
    for i, case in enumerate(cases):
        if not isinstance(case, dict) or "input" not in case or "output" not in case:
            raise ValueError(f'has a case {i} (from 0) that is not {{"input": ..., "output": ...}}')
        function = case.get("fn_name") or _metadata(case).get("func_name")
        kind = next((f"{key}={case[key]}" for key in _CALLS if case.get(key) == _CALLS[key]), None)
        if kind and not function:
            raise ValueError(f"has a case {i} (from 0) with {kind} and neither fn_name nor metadata.func_name")
        functions.append(function)
    if any(function != functions[0] for function in functions):
        raise ValueError("has cases of several functions; it needs one, or none in all of them")
    function = functions[0] if functions else None
    return [case["input"] for case in cases], [case["output"] for case in cases], function


def _metadata(case: dict[str, Any]) -> dict[str, Any]:
    metadata = case.get("metadata")
    if isinstance(metadata, str):
        with suppress(ValueError, RecursionError):  # a remark: what calls a function is refused for want of its name
            metadata = json.loads(metadata)
    return metadata if isinstance(metadata, dict) else {}


def _text(value: Any, what: str) -> str:
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if not isinstance(value, str):
        raise ValueError(f"has an {what} (from 0) that is no text, and names no function (fn_name)")
    return value


def _arguments(value: Any, i: int) -> list[Any]:
    if isinstance(value, str):
        try:
            return [json.loads(line) for line in value.splitlines() if line.strip()]
        except (ValueError, RecursionError):
            raise ValueError(f"has an input {i} (from 0) whose lines are not JSON") from None
    if not isinstance(value, list):
        raise ValueError(f"has an input {i} (from 0) that is not a list of arguments")
    return value


def _result(value: Any) -> Any:
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.strip().split("\n")]


def _same_line(given: str, expected: str) -> bool:
    if given == expected:
        return True
    words, expected_words = given.split(), expected.split()
    return len(words) == len(expected_words) and all(map(_same_word, words, expected_words))


def _same_word(given: str, expected: str) -> bool:
    if given == expected:
        return True
    if not _DECIMAL.fullmatch(given) or not _DECIMAL.fullmatch(expected):
        return False
    if _has_point(expected):
        return _close(float(given), float(expected))
    return _has_point(given) and Decimal(given) == Decimal(expected)  # 01 is not 1: it may be a text of digits


def _has_point(number: str) -> bool:
    return any(symbol in number for symbol in ".eE")


def _close(given: float, expected: float) -> bool:
    try:
        return math.isclose(given, expected, rel_tol=RELATIVE, abs_tol=ABSOLUTE)
    except OverflowError:  # an integer that no float holds
        return False
