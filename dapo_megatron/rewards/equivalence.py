"""Are two final answers the same mathematics? Numbers and tuples here, expressions by math-verify behind a guard.

An answer to be checked was written by a model and is hostile: what is long, deeply nested or would be huge when worked
out (9^9^9^9) is not handed on and counts as different. Nothing is evaluated as code: math-verify's LaTeX parser is a
grammar, and its other parser, which ends in `eval`, is not used.
"""

import logging
import re
from dataclasses import dataclass
from fractions import Fraction

from dapo_megatron.rewards.guard import is_tame
from dapo_megatron.rewards.rule import compare, is_integer, without_marks

MOST_CHARACTERS = 200
MOST_PARTS = 32

_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[^\W\d_]{3,}(?:[\s'.-]+[^\W\d_]+)*")
_ASSIGNED = re.compile(r"([A-Za-z](?:_\{?\w\}?)?|\\[a-z]+)\s*=(?!=)\s*(?=[^\s=])([^=]+)")
_UNIT = re.compile(r"\s*\\text\s*\{\s*([^{}]*?)\s*\}(?:\s*\^\s*\{?\s*([0-9])\s*\}?)?")
_IN_BASE = re.compile(r"([0-9A-Za-z]+)_\s*(?:\{\s*([0-9]+)\s*\}|([0-9]+))")
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,40})"
_NUMBER = re.compile(
    rf"(?P<sign>[+-]?)\s*(?:"
    rf"(?P<whole>{_DIGITS})?\s*\\frac\s*(?:\{{\s*(?P<n1>-?[0-9]{{1,40}})\s*\}}|(?P<n2>[0-9]))"
    rf"\s*(?:\{{\s*(?P<d1>-?[0-9]{{1,40}})\s*\}}|(?P<d2>[0-9]))"
    rf"|(?P<n3>{_DIGITS})\s*/\s*(?P<d3>[0-9]{{1,40}})"
    rf"|(?P<decimal>{_DIGITS}?\.[0-9]{{1,40}}|{_DIGITS}\.?)"
    r")\s*(?P<percent>\\?%)?"
)
_DISPLAY_FRACTION = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_SPACE = re.compile(r"\s+")
_SPACE_APART = re.compile(r"(?<![0-9])\s+|\s+(?![0-9])")  # 4 2 is not 42
_UNICODE = str.maketrans(
    {
        "π": r"\pi ",
        "∞": r"\infty ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        "×": r"\times ",
        "·": r"\cdot ",
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "±": r"\pm ",
        "²": "^2",
        "³": "^3",
        "θ": r"\theta ",
    }
)


def equivalent(given: str, reference: str) -> bool:
    """Whether two answers that differ by rule are mathematically equal.

    Decided in this order: equal texts without \\text{…}; words, which are equal only as texts; x = 5 against 5;
    numerals with a base, by digits and base; numbers (decimals, fractions, mixed numbers, percent, with a unit),
    compared exactly, a decimal of six or more places against a fraction to its last place; an integer reference,
    which nothing unevaluated equals (neither 6/3 nor \\sqrt{4} is an answer to 2); tuples and intervals by brackets and
    parts; all else by math-verify.
    """
    if max(len(given), len(reference)) > MOST_CHARACTERS:
        return False
    return _equivalent(_cleaned(given), _cleaned(reference))


def load() -> None:
    """Import and warm math-verify (a second or more), which is otherwise done at its first use."""
    _mathematically_equal("2\\sqrt{2}", "\\sqrt{8}")


def _equivalent(given: str, reference: str) -> bool:
    plain, reference_plain = (_SPACE.sub(" ", _TEXT.sub(r"\1", text)).strip(" .") for text in (given, reference))
    if not plain or not reference_plain:
        return False
    if _without_space(plain) == _without_space(reference_plain):
        return True
    words = [text.strip("() ") for text in (plain, reference_plain)]
    if any(_WORDS.fullmatch(text) for text in words):
        return words[0] == words[1]
    assigned, reference_assigned = _ASSIGNED.fullmatch(given), _ASSIGNED.fullmatch(reference)
    if assigned and reference_assigned and assigned[1] == reference_assigned[1]:
        return _same(assigned[2], reference_assigned[2])
    if assigned and "=" not in reference:
        return _same(assigned[2], reference)
    if reference_assigned and "=" not in given:
        return _same(given, reference_assigned[2])
    in_base, reference_in_base = _IN_BASE.fullmatch(given), _IN_BASE.fullmatch(reference)
    if in_base and reference_in_base:
        return in_base[1] == reference_in_base[1] and (in_base[2] or in_base[3]) == (
            reference_in_base[2] or reference_in_base[3]
        )
    if reference_in_base:  # whoever is asked in base 8 may leave the base out
        return given == reference_in_base[1]
    if is_integer(reference) and ("/" in given or "\\frac" in given):
        return False
    number, reference_number = _number(given), _number(reference)
    if number and reference_number:
        return number.equals(reference_number)
    if is_integer(reference):
        return False
    parts, reference_parts = _tuple(given), _tuple(reference)
    if parts and reference_parts:
        return len(parts) == len(reference_parts) and all(map(_same, parts, reference_parts))
    return is_tame(given) and is_tame(reference) and _mathematically_equal(given, reference)


def _same(given: str, reference: str) -> bool:
    verdict = compare(given, reference)
    return _equivalent(given.strip(), reference.strip()) if verdict is None else verdict


def _cleaned(answer: str) -> str:
    text = without_marks(answer.translate(_UNICODE))
    text = _DISPLAY_FRACTION.sub(r"\\frac", text)
    return re.sub(r"\\(?:mbox|textrm|textbf|textit|mathrm)(?=\s*\{)", r"\\text", text)


def _without_space(text: str) -> str:
    return _SPACE_APART.sub("", text)


@dataclass(frozen=True)
class _Number:
    """A rational number as written: `places` behind the point, −1 for an integer or a fraction; its unit, or ""."""

    value: Fraction
    places: int
    percent: bool
    unit: str

    def equals(self, other: "_Number") -> bool:
        if self.unit and other.unit and self.unit != other.unit:
            return False
        if self.percent != other.percent:
            share, plain = (self, other) if self.percent else (other, self)
            return plain.value in (share.value, share.value / 100)
        if self.value == other.value:
            return True
        places = max(self.places, other.places)
        one_is_a_fraction = min(self.places, other.places) < 0 and 1 not in (
            self.value.denominator if self.places < 0 else 0,
            other.value.denominator if other.places < 0 else 0,
        )
        return one_is_a_fraction and places >= 6 and abs(self.value - other.value) < Fraction(1, 10**places)


def _number(text: str) -> _Number | None:
    unit = ""
    found = _NUMBER.match(text)
    if not found:
        return None
    rest = text[found.end() :]
    if rest.strip():
        marked = _UNIT.fullmatch(rest)
        if not marked:
            return None
        unit = f"{marked[1].lower()}^{marked[2] or 1}" if marked[1] else ""
    numerator, denominator = found["n1"] or found["n2"] or found["n3"], found["d1"] or found["d2"] or found["d3"]
    places = -1
    if numerator is None:
        digits = found["decimal"].replace(",", "")
        value = Fraction(digits.removesuffix("."))
        if "." in digits.removesuffix("."):
            places = len(digits.partition(".")[2])
    elif int(denominator) == 0:
        return None
    else:
        value = Fraction(int(numerator.replace(",", "")), int(denominator))
        if found["whole"]:
            if value < 0:
                return None
            value += int(found["whole"].replace(",", ""))
    return _Number(-value if found["sign"] == "-" else value, places, found["percent"] is not None, unit)


def _tuple(text: str) -> list[str] | None:
    """[brackets, part, part, …] of "(a, b)", "[a, b)"…; None for anything else."""
    text = text.strip()
    if len(text) < 3 or text[0] not in "([" or text[-1] not in ")]" or text[-2] == "\\":
        return None
    parts, depth, start = [text[0] + text[-1]], 0, 1
    for i, symbol in enumerate(text):
        if symbol in "([{":
            depth += 1
        elif symbol in ")]}":
            depth -= 1
            if depth == 0 and i < len(text) - 1:
                return None
        elif symbol == "," and depth == 1:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:-1])
    return parts if depth == 0 and 3 <= len(parts) <= MOST_PARTS else None


def _mathematically_equal(given: str, reference: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import EmptySet

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own time limit is off
    logging.getLogger("latex2sympy2_extended").setLevel(logging.ERROR)
    try:
        sides = []
        for text in (reference, given):
            parsed = parse(
                f"\\boxed{{{text}}}",
                [LatexExtractionConfig(boxed_match_priority=0)],
                fallback_mode="no_fallback",
                extraction_mode="first_match",
                parsing_timeout=None,
            )
            # an interval written the wrong way round has no points, and so has every other such interval
            if not parsed or (parsed[0] == EmptySet and not re.search(r"\\(?:emptyset|varnothing)", text)):
                return False
            sides.append(parsed)
        return bool(verify(*sides, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True))
    except MemoryError:
        raise
    except Exception:  # neither parser nor comparison promise anything about strange input
        return False
