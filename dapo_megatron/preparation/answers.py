"""Reference answers, written in LaTeX, as exact numbers and as integers where they are integers."""

import re

import sympy

from dapo_megatron.data.integers import read_integer
from dapo_megatron.preparation.expressions import ExpressionError, as_integer, evaluate

_COMMANDS = re.compile(r"\\([a-zA-Z]+)")
_KNOWN = {"cdot": "*", "times": "*", "pi": "pi ", "left": "", "right": ""}
_ARGUMENT = re.compile(r"\s*(?:\{([^{}]*)\}|([0-9a-z]))")
# innermost first: arguments without braces inside
_CALL = re.compile(r"\\(frac|sqrt)\s*(?=[{0-9a-z])")
_MOST_CALLS = 16


def exact_integer(answer: str) -> int | None:
    """The integer that an answer is exactly, or None.

    Integers: "025", 142.0, 1{,}234, 336^\\circ, \\frac{6}{3}, \\sqrt{16}, 2^{10}.
    Units, equations, tuples, mixed numbers and numbers of another base are not guessed at.
    """
    value = read_integer(answer)
    if value is not None:
        return value
    try:
        return as_integer(exact_value(answer))
    except ExpressionError:
        return None


def exact_value(answer: str) -> sympy.Expr:
    """The real number that an answer stands for, exactly.

    Raises:
        ExpressionError: not a number, or one that is written in a way not understood here.
    """
    whole = read_integer(answer)
    return sympy.Integer(whole) if whole is not None else evaluate(arithmetic_of(answer))


def arithmetic_of(latex: str) -> str:
    """A LaTeX number in the notation of `expressions.py`: 11\\sqrt2 → 11 sqrt(2).

    Raises:
        ExpressionError: a command or sign without meaning here, a mixed number.
    """
    text = latex.replace("\N{MINUS SIGN}", "-").strip().removesuffix(".")
    text = re.sub(r"^\\\(|\\\)$|^\$|\$$|\\[!;]", "", text)
    text = re.sub(r"\^\s*(\{\s*\\circ\s*\}|\\circ)\s*$", "", text)
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    if re.search(r"[0-9]\s*\\frac", text):
        raise ExpressionError("a mixed number, or a product that looks like one")
    if re.search(r"\^\s*[0-9]{2}", text):
        raise ExpressionError("an exponent of two digits without braces")
    for _ in range(_MOST_CALLS):
        calls = list(_CALL.finditer(text))
        if not calls:
            break
        # the last one has none inside its arguments
        text = _without_call(text, calls[-1])
    text = _COMMANDS.sub(_known, text)
    return text.replace("{", "(").replace("}", ")")


def _without_call(text: str, call: re.Match) -> str:
    first = _ARGUMENT.match(text, call.end())
    if first is None:
        raise ExpressionError(f"\\{call[1]} without a plain argument")
    value = f"({first[1] or first[2]})"
    if call[1] == "sqrt":
        return f"{text[: call.start()]} sqrt{value}{text[first.end() :]}"
    second = _ARGUMENT.match(text, first.end())
    if second is None:
        raise ExpressionError("\\frac without a second argument")
    return f"{text[: call.start()]}({value}/({second[1] or second[2]})){text[second.end() :]}"


def _known(command: re.Match) -> str:
    if command[1] not in _KNOWN:
        raise ExpressionError(f"{command[0]} is not a part of a number")
    return _KNOWN[command[1]]
