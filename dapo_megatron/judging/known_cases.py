"""Judged cases of a known truth, made from questions with references alone; a teacher is played by random numbers.

For trying out, without a judge at hand, what is made of verdicts. Each question gives a YES, its reference in other
words, and a NO, the reference of another question in such words. The teacher's log-odds z of YES are those of a
calibrated judge: z ~ N(±d² / 2, d²), so that P(YES | z) = σ(z) where both occur alike, and Φ(d / 2) of its verdicts are
right.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dapo_megatron.data.prompts import Prompt
from dapo_megatron.errors import RequestError
from dapo_megatron.rewards.judge_prompt import Case, shown_answer
from dapo_megatron.rewards.judge_records import Judged

FORMS = ("{}", "it is {}", "{} I think", "the result: {}")
LONGEST = 60  # characters of a reference
CHARACTERS = 300


@dataclass(frozen=True)
class Known:
    """A case as a teacher judged it, and the truth."""

    judged: Judged
    right: bool


def known_cases(prompts: Sequence[Prompt], seed: int, sharpness: float = 2.5) -> list[Known]:
    """A YES and a NO for every question with a reference of one line, at most LONGEST characters. `sharpness`: d.

    Raises:
        RequestError: fewer than two references.
    """
    usable = [p for p in prompts if len(p.answer.strip()) <= LONGEST and len(p.answer.strip().splitlines()) == 1]
    references = sorted({prompt.answer.strip() for prompt in usable})
    if len(references) < 2:
        raise RequestError(
            f"{len(usable)} of {len(prompts)} questions have a reference of one line and at most {LONGEST} characters, "
            "and these are not two different ones; give a file of more questions"
        )
    rng = np.random.default_rng([seed, 4])
    found = []
    for prompt in usable:
        reference = prompt.answer.strip()
        place = references.index(reference)
        other = references[(place + int(rng.integers(1, len(references)))) % len(references)]
        for text, right in ((reference, True), (other, False)):
            answer = shown_answer("Answer: " + str(rng.choice(FORMS)).format(text), CHARACTERS)
            found.append(
                Known(Judged(Case(prompt.question, answer, reference), _teacher(right, sharpness, rng)), right)
            )
    return found


def _teacher(right: bool, sharpness: float, rng: np.random.Generator) -> float:
    odds = (0.5 if right else -0.5) * sharpness**2 + sharpness * rng.standard_normal()
    return float(1 / (1 + np.exp(-odds)))
