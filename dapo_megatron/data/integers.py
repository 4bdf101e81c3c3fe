"""Answers that are integers, and the marks around an answer that do not matter."""

import re

# longer ones are no answers, and int() of a million digits would take minutes
MOST_DIGITS = 1000

DECORATION = ' \t\r\n*`"'
"""White space and markdown around an answer."""

_INTEGER = re.compile(r"([+-]?)\s*([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.0*)?")
# Marks that wrap a number become a space, so that they cannot glue two numbers together; thin spaces vanish.
_WRAPPING = re.compile(
    r"\^\s*(?:\{\s*)?\\circ(?:\s*\})?|\\degree|°|\\[()\[\]]|\\?\$|\\left(?![a-zA-Z])|\\right(?![a-zA-Z])"
)
# LaTeX ignores white space behind \!, which only ever stands inside a number
_THIN_SPACE = re.compile(r"\\,|\\!\s*")


def read_integer(answer: str) -> int | None:
    """The integer an answer is, or None.

    Leading zeros, a sign, thousands separators ("1,234", "1{,}234", "1,\\!234"), a zero fraction (142.0), math
    delimiters, a currency sign, a degree mark ("336^\\circ") and a full stop do not matter.
    """
    parts = split_integer(without_marks(answer))
    if parts is None or len(parts[1]) > MOST_DIGITS:
        return None
    sign, digits = parts
    return int(sign + digits)


def split_integer(text: str) -> tuple[str, str] | None:
    """("-" or "", digits without leading zeros) of an integer that stands in `text` alone, or None. Linear in the
    length; zero has no sign."""
    match = _INTEGER.fullmatch(text)
    if match is None:
        return None
    digits = match[2].replace(",", "").lstrip("0") or "0"
    return "-" if match[1] == "-" and digits != "0" else "", digits


def without_marks(answer: str) -> str:
    """An answer without what wraps it: math delimiters, \\left and \\right, degree marks, markdown, a final period."""
    text = answer.replace("\N{MINUS SIGN}", "-").replace("{,}", ",")
    text = _THIN_SPACE.sub("", _WRAPPING.sub(" ", text))
    return text.strip(DECORATION).removesuffix(".").rstrip(DECORATION)
