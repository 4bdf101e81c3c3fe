"""The final answer is cut out of a response and compared with the reference by rule.

Responses are written by a model and therefore hostile: nothing is evaluated, every step takes time linear in the
length, and numbers stay strings (converting a million digits to an int would be quadratic).
"""

import re
from collections import deque

from dapo_megatron.data.integers import DECORATION, split_integer, without_marks

# Lower case is prose ("we check our answer: 3 · 4 = 12"). Markdown may stand between the word and its
# colon ("**Answer**: 7"); Chinese responses write a full-width colon.
_ANSWER_MARK = re.compile(r"(?:Answer|ANSWER)\**\s*[:\uff1a]")
# Escaped braces are LaTeX set braces and do not nest.
_BRACE = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")

_DISPLAY_FRACTION = re.compile(r"\\[dt]frac(?![a-zA-Z])")
_SPACE = re.compile(r"\s+")
_BLANK = re.compile(r'[\s*`"]*')


def compare(given: str, reference: str) -> bool | None:
    """Whether two final answers are equal by rule: True, False, or None where the rule cannot tell.

    When both are integers their values decide: $ and LaTeX math delimiters, thousands separators (1,234 and 1{,}234),
    leading zeros, a plus sign, a trailing period, a zero fraction (142.0) and a degree mark do not matter. Otherwise
    equal normalised strings are equal answers: the same marks and all white space dropped, \\dfrac and \\tfrac read as
    \\frac; different ones leave it open. An empty answer is equal to none.
    """
    kind, value = _normalise(given)
    reference_kind, reference_value = _normalise(reference)
    if not value or not reference_value:
        return False
    if (kind, value) == (reference_kind, reference_value):
        return True
    return False if kind == reference_kind == "integer" else None


def is_integer(answer: str) -> bool:
    """True for an answer whose value the integer rule reads."""
    return _normalise(answer)[0] == "integer"


def extract_answer(response: str) -> str | None:
    """The final answer in a response: what follows the last "Answer:", or the last \\boxed{…}, whichever starts later.

    The whole response is read. An answer ends with its line; when nothing follows the mark on its line, the next line
    that is not blank counts. A box needs balanced braces; of nested boxes the inner one starts later. None when there
    is neither.
    """
    box_start, box = _last_box(response)
    line_start, line = _last_answer_line(response)
    if box_start < 0 and line_start < 0:
        return None
    return box if box_start > line_start else line


def final_answer(response: str) -> str | None:
    """The final answer as a majority counts it: "025", "25." and "$25$" are one answer. None when there is none."""
    given = extract_answer(response)
    return None if given is None else _normalise(given)[1] or None


def _last_answer_line(text: str) -> tuple[int, str]:
    """(start of the mark, what follows it), start −1 when no mark is followed by anything."""
    # a mark before another one is always followed by something, so the last two decide and no line is read twice
    marks = deque(_ANSWER_MARK.finditer(text), maxlen=2)
    for mark in reversed(marks):
        line = _line_at(text, mark.end()) or _line_at(text, _BLANK.match(text, mark.end()).end())
        if line:
            return mark.start(), line
    return -1, ""


def _line_at(text: str, start: int) -> str:
    end = text.find("\n", start)
    return text[start : end if end >= 0 else len(text)].strip(DECORATION)


def _last_box(text: str) -> tuple[int, str]:
    """(start, content) of the balanced \\boxed{…} that starts last, start −1 when there is none."""
    # nearly always the last one is balanced, and then nothing before it matters
    last = text.rfind("\\boxed")
    if last < 0:
        return -1, ""
    found = _last_balanced_box(text, last)
    return found if found[0] >= 0 else _last_balanced_box(text, 0)


def _last_balanced_box(text: str, begin: int) -> tuple[int, str]:
    best_start, best_content = -1, (0, 0)
    open_braces: list[tuple[int, int]] = []  # (start of \boxed or −1 for a plain brace, start of the content)
    for token in _BRACE.finditer(text, begin):
        symbol = token.group()
        if symbol == "}":
            if open_braces:
                start, content = open_braces.pop()
                if start > best_start:
                    best_start, best_content = start, (content, token.start())
        elif symbol == "{":
            open_braces.append((-1, token.end()))
        elif symbol[1] == "b":
            open_braces.append((token.start(), token.end()))
    return best_start, text[slice(*best_content)].strip(DECORATION)


def _normalise(answer: str) -> tuple[str, str]:
    """("integer", sign and digits) or ("text", normalised text). The kind keeps "4 2" from equalling 42."""
    text = without_marks(answer)
    integer = split_integer(text)
    if integer is not None:
        return "integer", "".join(integer)
    return "text", _SPACE.sub("", _DISPLAY_FRACTION.sub(r"\\frac", text))
