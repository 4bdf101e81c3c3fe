"""Which answers are cheap to work out? What is not goes nowhere near a computer algebra system."""

import re
from math import prod

MOST_NESTING = 8
MOST_DIGITS = 40  # of one number
MOST_EXPONENT = 2000
MOST_GROUP_POWER = 200  # product of all exponents where a group is raised to a power
MOST_COMBINATORIAL_DIGITS = 2

_KNOWN = """
    frac sqrt pi infty cup cap in notin le leq ge geq lt gt ne neq cdot times div pm mp text
    sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh ln log exp binom
    alpha beta gamma delta epsilon theta lambda mu phi varphi rho sigma tau omega
    emptyset varnothing mathbb begin end quad qquad setminus mid colon lvert rvert lfloor rfloor lceil rceil
"""
_COMMANDS = frozenset(re.findall("[a-z]+", _KNOWN))
_ENVIRONMENTS = frozenset(("pmatrix", "bmatrix", "vmatrix", "matrix"))
_COMMAND = re.compile(r"\\([a-zA-Z]+|.)", re.DOTALL)
_COMMAND_SYMBOLS = frozenset("\\{}%,;:! |")
_ENVIRONMENT = re.compile(r"\\(?:begin|end)\s*\{([^{}]*)\}")
_BRACKETS = {")": "(", "]": "[", "}": "{"}
_EXPONENT = re.compile(r"\^\s*(?:\{([^{}]*)\}|\\[a-z]+|(-?\w+))")
_SCIENTIFIC = re.compile(r"[0-9]\s*[eE]\s*[+-]?\s*[0-9]{3}")


def is_tame(answer: str) -> bool:
    """Whether an answer is of known LaTeX commands, balanced, shallow, and of no huge value.

    Exponents hold no exponents and no numbers over MOST_EXPONENT; factorials and binomials only small numbers; sums,
    products, integrals and limits are not known.
    """
    if not answer.isascii() or not answer.isprintable():
        return False
    commands = _COMMAND.findall(answer)
    if any(command not in _COMMANDS and command not in _COMMAND_SYMBOLS for command in commands):
        return False
    if any(name.strip() not in _ENVIRONMENTS for name in _ENVIRONMENT.findall(answer)):
        return False
    if commands.count("exp") > 1 or not _is_shallow(answer):
        return False
    longest = max(map(len, re.findall("[0-9]+", answer)), default=0)
    if longest > MOST_DIGITS or _SCIENTIFIC.search(answer) or "**" in answer:
        return False
    return _has_small_powers(answer, longest)


def _is_shallow(answer: str) -> bool:
    """Braces balance and nest at most MOST_NESTING deep, other brackets included (those of [a, b) need not match)."""
    braces = depth = 0
    text = re.sub(r"\\[{}\\]", " ", answer)
    for symbol in text:
        if symbol in "([{":
            depth += 1
        elif symbol in ")]}":
            depth -= 1
        braces += (symbol == "{") - (symbol == "}")
        if braces < 0 or depth < 0 or depth > MOST_NESTING:
            return False
    return braces == 0 and depth == 0


def _has_small_powers(answer: str, longest: int) -> bool:
    exponents = [(match[1] or match[2] or "", match.start()) for match in _EXPONENT.finditer(answer)]
    combinatorial = "!" in answer.replace("\\!", "") or "\\binom" in answer
    if combinatorial and (
        longest > MOST_COMBINATORIAL_DIGITS or answer.count("^") or re.search(r"[!)}]\s*!|\\binom.*\\binom", answer)
    ):
        return False
    if len(exponents) != answer.count("^"):  # an exponent with braces in it: a power, a fraction
        return False
    sizes, group_raised = [], False
    for exponent, start in exponents:
        if answer[start + 1 :].lstrip().startswith("{") and re.search(r"[*!]|\\(?:times|cdot)", exponent):
            return False
        if re.match(r"\s*\^", answer[start + 1 :].lstrip(" {")) or "^" in exponent:
            return False
        numbers = [int(number) for number in re.findall("[0-9]{1,9}", exponent)]
        sizes.append(max([1, *numbers]))
        group_raised |= answer[:start].rstrip().endswith((")", "}", "]"))
    if re.search(r"\^\s*(?:\{[^{}]*\}|[+-]?\w+)\s*\^", answer):
        return False
    if max(sizes, default=1) > MOST_EXPONENT:
        return False
    return not group_raised or prod(sizes) <= MOST_GROUP_POWER
