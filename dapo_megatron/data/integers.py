"""Answers that are integers, in the spellings that the rule grader takes for one."""

import re

# longer ones are no answers, and int() of a million digits would take minutes
MOST_DIGITS = 1000

_INTEGER = re.compile(r"([+-]?)\s*([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.0*)?", re.ASCII)
_MARKS = re.compile(
    r"\^\s*(?:\{\s*)?\\circ(?:\s*\})?|\\degree|°|\\[()\[\]]|\\?\$|\\left(?![a-zA-Z])|\\right(?![a-zA-Z])"
)


def read_integer(answer: str) -> int | None:
    """The integer an answer is, or None.

    Leading zeros, a sign, thousands separators ("1,234", "1{,}234", "1,\\!234"), a zero fraction (142.0), math
    delimiters, a currency sign, a degree mark ("336^\\circ") and a full stop do not matter.
    """
    text = answer.replace("\N{MINUS SIGN}", "-").replace("{,}", ",")
    text = re.sub(r"\\[!,]", "", _MARKS.sub(" ", text)).strip(' \t\r\n*`"')
    match = _INTEGER.fullmatch(text)
    if match is None or len(match[2]) > MOST_DIGITS:
        return None
    value = int(match[2].replace(",", ""))
    return -value if match[1] == "-" else value
