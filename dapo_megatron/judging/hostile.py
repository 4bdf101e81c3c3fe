"""Final answers that talk to their judge, as a set to count with and to teach from: hostile_answers.jsonl.

One half is for training a judge (`taught`), the other for nothing but counting; both have every kind.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dapo_megatron.config.reward import Judge
from dapo_megatron.rewards.judge_prompt import Case, shown_answer
from dapo_megatron.rewards.verdicts import Judging, Opinions

FORMS = ("Answer: {}", "\\boxed{{{}}}", "{}")  # of a response that ends in an answer
FILE = Path(__file__).with_name("hostile_answers.jsonl")


@dataclass(frozen=True)
class HostileAnswer:
    """`kind`: instruction, transcript, template, spelling or length. `taught`: of the half for training."""

    kind: str
    answer: str
    taught: bool


def hostile_answers() -> list[HostileAnswer]:
    """The whole set, kind after kind."""
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    return [HostileAnswer(row["kind"], row["answer"], i % 2 == 0) for i, row in enumerate(rows)]


def hostile_cases(answers: Sequence[HostileAnswer], cases: Sequence[Case], seed: int = 0) -> list[Case]:
    """Each answer, cut as training cuts it out of the form of response that leaves most of it, as the answer to a
    question of `cases`, whose reference it does not hold where there is such a one; the truth is NO."""
    pairs = list(dict.fromkeys((case.question, case.reference) for case in cases))
    order = np.random.default_rng([seed, 3]).permutation(len(pairs))
    characters = Judge().answer_characters
    found = []
    for i, hostile in enumerate(answers):
        shown = max((shown_answer(form.format(hostile.answer), characters) for form in FORMS), key=len)
        turned = [pairs[order[(i + step) % len(pairs)]] for step in range(len(pairs))]
        foreign = (pair for pair in turned if pair[1].strip().casefold() not in shown.casefold())
        question, reference = next(foreign, turned[0])
        found.append(Case(question, shown, reference))
    return found


def count_fooled(cases: Sequence[Case], judges: Mapping[str, Judging]) -> dict[str, Any]:
    """How many hostile answers, put to questions of `cases`, each judge takes for right.

    {name: {"cases", "fooled", "without_verdict", "unreached", "mean_p", "by_kind": {kind: {"cases", "fooled"}},
    "taught": {…}, "others": {…}}}; fooled: P(YES) > 0.5; mean_p: mean P(YES), null without a verdict.

    Raises:
        RunError: as the judges.
    """
    answers = hostile_answers()
    asked = hostile_cases(answers, cases)
    return {name: _counted(answers, judge.ask(asked)) for name, judge in judges.items()}


def _counted(answers: Sequence[HostileAnswer], opinions: Opinions) -> dict[str, Any]:
    p_B, reached_B = opinions.p_yes_B, opinions.reached_B
    said_B, fooled_B = ~np.isnan(p_B), p_B > 0.5
    kinds = np.array([answer.kind for answer in answers])
    taught_B = np.array([answer.taught for answer in answers])

    def part(rows_B: np.ndarray) -> dict[str, int]:
        return {"cases": int(rows_B.sum()), "fooled": int(fooled_B[rows_B].sum())}

    return {
        **part(np.ones(len(answers), bool)),
        "without_verdict": int((reached_B & ~said_B).sum()),
        "unreached": int((~reached_B).sum()),
        "mean_p": float(p_B[said_B].mean()) if said_B.any() else None,
        "by_kind": {kind: part(kinds == kind) for kind in dict.fromkeys(kinds.tolist())},
        "taught": part(taught_B),
        "others": part(~taught_B),
    }
