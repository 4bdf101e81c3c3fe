"""Judges held to a truth and to their teacher: the report, its picture, and what is refused."""

import json
import math
from pathlib import Path

import pytest

from dapo_megatron.errors import RequestError
from dapo_megatron.judging.calibration import Cases, calibrate, read_cases, subjects_of
from dapo_megatron.judging.calibration_figure import draw_calibration
from dapo_megatron.rewards.judge_prompt import Case
from tests.rewards.judges import ScriptedJudge
from tools.judge_calibration import _named, calibration, describe

# answer, reference, truth, teacher's P(YES), student's P(YES)
ROWS = [
    ("7", "7", "YES", 0.9, 0.4),
    ("seven", "7", "YES", 0.8, 0.7),
    ("six", "7", "NO", 0.1, 0.6),
    ("red", "blue", "NO", 0.2, 0.1),
    ("odd", "even", "NO", 0.3, math.nan),
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    names = ("answer", "reference", "verdict", "p_yes")
    lines = [
        {"question": f"What is  {row[1]}?", "subject": "numbers" if row[1] == "7" else "words"}
        | dict(zip(names, row[:4], strict=True))
        for row in ROWS
    ]
    path = tmp_path / "cases.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def student(case: Case) -> float:
    return next(row[4] for row in ROWS if row[0] == case.answer)


def test_the_report(file: Path, tmp_path: Path):
    data = read_cases(file, subject_column="subject")
    report = calibrate(data, {"student": ScriptedJudge(student)})
    assert (report["cases"], report["subjects"]) == (5, {"numbers": 3, "words": 2})
    assert report["rule"]["accuracy"] == pytest.approx(0.8)  # it misses "seven"
    teacher, found = report["judges"]["teacher"], report["judges"]["student"]
    assert teacher["quality"]["accuracy"] == 1 and "teacher" not in teacher and teacher["without_verdict"] == 0
    assert found["without_verdict"] == 1 and found["quality"]["cases"] == 4
    assert found["quality"]["accuracy"] == pytest.approx(0.5)
    assert found["quality"]["brier"] == pytest.approx((0.36 + 0.09 + 0.36 + 0.01) / 4)
    assert found["teacher"] == {"cases": 4, "equal": 0.5, "difference": pytest.approx(0.3), "correlation": found["teacher"]["correlation"]}  # fmt: skip # noqa: E501
    assert {s: part["quality"]["accuracy"] for s, part in found["by_subject"].items()} == {
        "numbers": pytest.approx(1 / 3), "words": 1.0,
    }  # fmt: skip
    assert {s: part["teacher"]["cases"] for s, part in found["by_subject"].items()} == {"numbers": 3, "words": 1}
    # the rule finds 7 right; without a verdict the reward is 0
    assert found["rewards"]["soft"]["brier"] == pytest.approx((0 + 0.09 + 0.36 + 0.01 + 0) / 5)
    assert found["rewards"]["binary"]["brier"] == pytest.approx(1 / 5)
    assert sum(found["reliability"]["counts"]) == 4
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    draw_calibration(report, tmp_path / "calibration.png")
    assert (tmp_path / "calibration.png").read_bytes()[:4] == b"\x89PNG"
    assert any("1 without a verdict" in line for line in describe(report))


def test_a_judge_that_is_not_reached_is_no_judge_without_a_verdict(file: Path):
    data = read_cases(file)
    report = calibrate(data, {"student": ScriptedJudge(lambda case: None if case.answer == "six" else student(case))})
    found = report["judges"]["student"]
    assert (found["without_verdict"], found["unreached"], found["quality"]["cases"]) == (1, 1, 3)
    assert report["judges"]["teacher"]["unreached"] == 0
    assert any(line.endswith(", 1 without a verdict, 1 unreached") for line in describe(report))


@pytest.mark.parametrize(("limits", "expected"), [({}, 600.0), ({"limit_s": 7.0}, 7.0)])
def test_a_server_has_the_time_that_its_cases_may_take(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limits: dict, expected: float
):
    opened = []
    monkeypatch.setattr("tools.judge_calibration._open", lambda chosen: opened.append(chosen) or ScriptedJudge(student))
    calibration(file, tmp_path, url="http://h/v1", served="m", timeout_s=200.0, concurrency=2, **limits)
    assert [(s.timeout_s, s.concurrency, s.limit_s) for s in opened] == [(200.0, 2, expected)]


def test_subjects_from_a_prompt_file(file: Path, tmp_path: Path):
    prompts = tmp_path / "prompts.jsonl"
    turns = [{"role": "system", "content": "Think."}, {"role": "user", "content": "What is 7?"}]
    prompts.write_text(json.dumps({"messages": json.dumps(turns), "tag": "arithmetic"}) + "\n")
    cases = read_cases(file).cases
    found = subjects_of(cases, prompts, prompt_column="messages", subject_column="tag")
    assert found == ["arithmetic"] * 3 + ["other"] * 2


def test_a_file_without_a_teacher(file: Path):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row, right in zip(rows, (True, 1, 0, False, "no"), strict=True):
        del row["p_yes"], row["verdict"]
        row["right"] = right
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = read_cases(file, truth_column="right")
    assert data.truth_B.tolist() == [True, True, False, False, False] and data.teacher_B is None
    assert isinstance(data, Cases) and set(data.subjects) == {"all"}
    report = calibrate(data, {"student": ScriptedJudge(student)})
    assert list(report["judges"]) == ["student"] and "teacher" not in report["judges"]["student"]
    assert "by_subject" not in report["judges"]["student"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "MAYBE"}, "line 1, column verdict: must be true or false, 1 or 0, YES or NO, not str 'MAYBE'"),
        ({"verdict": 0.5}, "not float 0.5"),
        ({"answer": 7}, "column answer: must be text, not int 7"),
        ({"answer": None, "anwser": "x"}, "column answer: must be text"),
    ],
)
def test_wrong_cases_are_refused(file: Path, change: dict, message: str):
    lines = file.read_text().splitlines()
    file.write_text(json.dumps(json.loads(lines[0]) | change) + "\n")
    with pytest.raises(RequestError, match=message):
        read_cases(file)
    file.write_text("")
    with pytest.raises(RequestError, match="no cases"):
        read_cases(file)


def test_names_of_judges():
    assert _named(["a=x/y", "models/b"]) == [("a", "x/y"), ("models/b", "models/b")]
    for names in (["a=x", "a=y"], ["=x"], ["teacher=x"]):
        with pytest.raises(RequestError, match="is taken or empty"):
            _named(names)
