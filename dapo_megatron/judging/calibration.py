"""Judges on cases whose truth is known: how often right, how well calibrated, how like their teacher, what they reward.

A case is (question, answer, reference) with a truth: a column of its own, or else the teacher's verdict. Each judge is
asked once. `rule`, `binary` and `soft` are compared as rewards: 1 where the rule says right, else the judge's verdict
or its P(YES), 0 where it has none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dapo_megatron.data.prompt_template import bare_question
from dapo_megatron.data.prompts import read_prompts
from dapo_megatron.data.rows import pick_column, read_rows, shown
from dapo_megatron.errors import RequestError
from dapo_megatron.judging.agreement import as_json, likeness, quality, reliability
from dapo_megatron.rewards.judge_prompt import Case
from dapo_megatron.rewards.pool import GraderPool
from dapo_megatron.rewards.verdicts import Judging, Opinions

ALL = "all"  # the subject of cases without one
OTHER = "other"
TEACHER = "teacher"
WORDS = {"YES": True, "NO": False}


@dataclass(frozen=True)
class Cases:
    """B cases. truth_B: bool. teacher_B: float64 P(YES), None where the file has none. subjects: one each."""

    cases: list[Case]
    truth_B: np.ndarray
    teacher_B: np.ndarray | None
    subjects: list[str]


def read_cases(path: Path, *, truth_column: str | None = None, subject_column: str | None = None) -> Cases:
    """Cases of a .parquet, .jsonl or .json file with the columns question, answer, reference.

    Args:
        truth_column: true and false, 1 and 0, or YES and NO; None = the column verdict.
        subject_column: text; None = all cases are of one.

    Raises:
        RequestError: a file that cannot be read, a missing column, a value that is none, no rows.
    """
    truth_column = truth_column or "verdict"
    names = ("question", "answer", "reference", truth_column, *([subject_column] if subject_column else []))
    cases, truths, teacher, subjects = [], [], [], []
    for where, row in read_rows(path, (*names, "p_yes")):
        values = [pick_column(row, name, None, where) for name in names]
        for name, value in zip(names[:3], values[:3], strict=True):
            if not isinstance(value, str):
                raise RequestError(f"{where}, column {name}: must be text, not {shown(value)}")
        cases.append(Case(*values[:3]))
        truths.append(_truth(values[3], f"{where}, column {truth_column}"))
        subjects.append(str(values[4]) if subject_column else ALL)
        teacher.append(row.get("p_yes"))
    if not cases:
        raise RequestError(f"{path}: no cases")
    known = all(isinstance(p, float) and 0 <= p <= 1 for p in teacher)
    return Cases(cases, np.array(truths, bool), np.array(teacher, np.float64) if known else None, subjects)


def subjects_of(cases: Sequence[Case], path: Path, *, prompt_column: str, subject_column: str) -> list[str]:
    """The subject of each case's question, looked up in a prompt file; OTHER where the question is not in it.

    Raises:
        RequestError: as `read_prompts`, of a file whose answers are subjects.
    """
    prompts = read_prompts(path, prompt_column=prompt_column, answer_column=subject_column)
    known = {bare_question(prompt.question): prompt.answer for prompt in prompts}
    return [known.get(bare_question(case.question), OTHER) for case in cases]


def calibrate(data: Cases, judges: Mapping[str, Judging]) -> dict[str, Any]:
    """The report on `judges` by name, and on the teacher where the file knows its P(YES).

    {"cases", "subjects": {subject: cases}, "rule": quality, "judges": {name: judge}} with a judge = {"without_verdict",
    "unreached", "quality", "reliability", "teacher": likeness, "rewards": {"binary": quality, "soft": quality},
    "by_subject": {subject: {"quality", "teacher"}}}. without_verdict: the reply was neither YES nor NO; unreached: no
    reply. All but the rewards are over the cases with a verdict.

    Raises:
        RunError: as the judges.
    """
    rule_B = _rule(data.cases)
    opinions = {name: judge.ask(data.cases) for name, judge in judges.items()}
    if data.teacher_B is not None:
        opinions = {TEACHER: Opinions(data.teacher_B, np.ones(len(data.cases), bool), "")} | opinions
    return {
        "cases": len(data.cases),
        "subjects": {subject: data.subjects.count(subject) for subject in sorted(set(data.subjects))},
        "rule": as_json(quality(rule_B.astype(float), data.truth_B)),
        "judges": {name: _report(name, said, rule_B, data) for name, said in opinions.items()},
    }


def _report(name: str, opinions: Opinions, rule_B: np.ndarray, data: Cases) -> dict[str, Any]:
    p_B, reached_B = opinions.p_yes_B, opinions.reached_B
    said_B = ~np.isnan(p_B)
    values = {"binary": (p_B > 0.5).astype(float), "soft": p_B}
    rewards = {mode: np.where(rule_B, 1.0, np.where(said_B, value_B, 0.0)) for mode, value_B in values.items()}
    report = {
        "without_verdict": int((reached_B & ~said_B).sum()),
        "unreached": int((~reached_B).sum()),
        "reliability": as_json(reliability(p_B[said_B], data.truth_B[said_B])),
        "rewards": {mode: as_json(quality(reward_B, data.truth_B)) for mode, reward_B in rewards.items()},
        **_compared(name, p_B, said_B, data),
    }
    subjects = np.array(data.subjects)
    if len(set(data.subjects)) > 1:
        names = sorted(set(data.subjects))
        report["by_subject"] = {s: _compared(name, p_B, said_B & (subjects == s), data) for s in names}
    return report


def _compared(name: str, p_B: np.ndarray, rows_B: np.ndarray, data: Cases) -> dict[str, Any]:
    found = {"quality": as_json(quality(p_B[rows_B], data.truth_B[rows_B]))}
    if name != TEACHER and data.teacher_B is not None:
        found["teacher"] = as_json(likeness(p_B[rows_B], data.teacher_B[rows_B]))
    return found


def _rule(cases: Sequence[Case]) -> np.ndarray:
    with GraderPool(1, 2.0) as pool:
        return pool.grade([f"Answer: {case.answer}" for case in cases], [case.reference for case in cases])


def _truth(value: Any, where: str) -> bool:
    if isinstance(value, str) and value.strip().upper() in WORDS:
        return WORDS[value.strip().upper()]
    if isinstance(value, bool) or (isinstance(value, int | float) and value in (0, 1)):
        return bool(value)
    raise RequestError(f"{where}: must be true or false, 1 or 0, YES or NO, not {shown(value)}")
