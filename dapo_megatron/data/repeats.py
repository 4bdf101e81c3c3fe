"""Questions that occur more than once in a data set, answers that contradict each other, questions of two data sets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dapo_megatron.data.integers import read_integer
from dapo_megatron.data.prompt_template import bare_question
from dapo_megatron.data.prompts import Prompt

_SHOWN = 3  # examples in a report
_SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class Repeats:
    """What repeats in a list of prompts; numbers are positions in that list.

    groups: positions of each question that occurs more than once, in order of first occurrence. conflicts: those of
    `groups` whose answers differ.
    """

    prompts: int
    groups: tuple[tuple[int, ...], ...]
    conflicts: tuple[tuple[int, ...], ...]

    @property
    def surplus(self) -> int:
        """Rows beyond the first of their question."""
        return sum(len(group) - 1 for group in self.groups)


def answer_key(answer: str) -> str:
    """Equal for answers that say the same: integers by value, all else by its text without white space."""
    value = read_integer(answer)
    return "".join(answer.split()) if value is None else str(value)


def find_repeats(prompts: Sequence[Prompt], template: str | None = None) -> Repeats:
    """Group prompts by question: white space normalised, templates taken off (`bare_question`)."""
    places: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        places.setdefault(bare_question(prompt.text, template), []).append(i)
    groups = tuple(tuple(group) for group in places.values() if len(group) > 1)
    conflicts = tuple(group for group in groups if len({answer_key(prompts[i].answer) for i in group}) > 1)
    return Repeats(len(prompts), groups, conflicts)


def repeats_to_drop(
    prompts: Sequence[Prompt], repeats: Repeats, *, duplicates: bool, conflicts: bool
) -> dict[int, str]:
    """Position → reason ("conflict" or "duplicate") of what goes.

    conflicts: every row of a question with differing answers. duplicates: every row whose question and answer an
    earlier one has.
    """
    reasons: dict[int, str] = {}
    for group in repeats.groups:
        if conflicts and group in repeats.conflicts:
            reasons |= dict.fromkeys(group, "conflict")
        elif duplicates:
            seen: set[str] = set()
            for i in group:
                key = answer_key(prompts[i].answer)
                if key in seen:
                    reasons[i] = "duplicate"
                seen.add(key)
    return reasons


def describe_repeats(prompts: Sequence[Prompt], repeats: Repeats) -> list[str]:
    """Lines for people: counts and first examples; none when nothing repeats."""
    if not repeats.groups:
        return []
    lines = [
        f"{repeats.surplus} of {repeats.prompts} prompts repeat an earlier question"
        + _examples(repeats.groups, lambda group: f"rows {_joined(prompts[i].id for i in group)}")
    ]
    if repeats.conflicts:
        lines.append(
            f"{len(repeats.conflicts)} questions have conflicting answers"
            + _examples(
                repeats.conflicts,
                lambda group: (
                    f"rows {_joined(prompts[i].id for i in group)} say {_joined(prompts[i].answer for i in group)}"
                ),
            )
        )
    return lines


def find_overlap(
    training: Sequence[Prompt], held_out: Sequence[Prompt], template: str | None = None
) -> list[tuple[int, int]]:
    """(position in training, position in held_out) of every training prompt whose question is held out too."""
    places: dict[str, int] = {}
    for i, prompt in enumerate(held_out):
        places.setdefault(bare_question(prompt.text, template), i)
    pairs = ((i, places.get(bare_question(prompt.text, template))) for i, prompt in enumerate(training))
    return [(i, j) for i, j in pairs if j is not None]


def short(text: str) -> str:
    """A question on one line, cut."""
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"


def _examples(groups: Sequence[tuple[int, ...]], tell: Callable[[tuple[int, ...]], str]) -> str:
    return ": " + "; ".join(map(tell, groups[:_SHOWN])) + ("; …" if len(groups) > _SHOWN else "")


def _joined(values) -> str:
    values = [short(str(value)) for value in values]
    return ", ".join(values[:4]) + (" …" if len(values) > 4 else "")
