"""Collected verdicts become worked examples: balanced, split by question, hard or soft."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.errors import RequestError
from dapo_megatron.judging.export import Export, balanced, examples_of, export_judged, split_by_question
from dapo_megatron.rewards.judge_prompt import PROMPT, Case, render
from dapo_megatron.rewards.judge_records import Judged, read_judged, write_judged
from tests.command_line import ROOT

WORDING = "{question}|{answer}|{reference}"


def judged(*shares: float) -> list[Judged]:
    return [Judged(Case(f"q{i // 3}", f"a{i}", "r"), share) for i, share in enumerate(shares)]


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40), st.integers(0, 5))
def test_as_many_yes_as_no(shares: list[float], seed: int):
    rows = judged(*shares, 1.0, 0.0)
    kept = balanced(rows, seed)
    counts = [sum(row.verdict == word for row in kept) for word in ("YES", "NO")]
    assert counts[0] == counts[1] == min(sum(r.verdict == word for r in rows) for word in ("YES", "NO"))
    assert kept == [row for row in rows if row in kept] == balanced(rows, seed)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.floats(0.05, 0.95))
def test_no_question_is_on_both_sides(shares: list[float], share: float):
    rows = judged(*shares)
    rest, held = split_by_question(rows, share, 0)
    assert sorted(rest + held, key=rows.index) == rows and held
    assert not {row.case.question for row in rest} & {row.case.question for row in held}


def test_targets():
    rows = judged(0.75, 0.0, 1.0)
    hard = {(e["prompt"], e["response"]): e["weight"] for e in examples_of(rows, "hard", WORDING, 0)}
    assert hard == {('q0|"a0"|"r"', "YES"): 1.0, ('q0|"a1"|"r"', "NO"): 1.0, ('q0|"a2"|"r"', "YES"): 1.0}
    soft = {(e["prompt"], e["response"]): e["weight"] for e in examples_of(rows, "soft", WORDING, 0)}
    assert soft == hard | {('q0|"a0"|"r"', "YES"): 0.75, ('q0|"a0"|"r"', "NO"): 0.25}


def test_from_file_to_file(tmp_path: Path):
    write_judged(tmp_path / "a.parquet", judged(*[0.9, 0.2, 0.1] * 10))
    write_judged(tmp_path / "b.parquet", judged(*[0.0] * 3))  # known already, with other verdicts
    inputs = (tmp_path / "a.parquet", tmp_path / "b.parquet")
    counts = export_judged(
        Export(inputs, tmp_path / "train.jsonl", held_out=tmp_path / "held.parquet", held_out_share=0.2)
    )
    assert counts == {"read": 30, "held out": 6, "YES": 8, "NO": 16, "cases": 16, "examples": 16}
    held = {row.case.question for row in read_judged(tmp_path / "held.parquet")}
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(held) == 2 and not any(f"\n{question}\n" in line["prompt"] for line in lines for question in held)
    assert {tuple(line) for line in lines} == {("prompt", "response", "weight")}
    asked = {render(row.case, PROMPT): row.verdict for row in read_judged(inputs[0])}
    assert all(asked[line["prompt"]] == line["response"] for line in lines)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": "train.csv"}, r"the output must be \.jsonl or \.parquet"),
        ({"output": "a.parquet"}, "is read by this request"),
        ({"output": "there.jsonl"}, "exists; choose another name"),
        ({"held_out": "held.jsonl"}, r"held-out cases are written as \.parquet"),
        ({"output": "b.parquet", "held_out": "b.parquet"}, "is named twice"),
        ({"held_out_share": 1.0}, "--held-out-share 1.0 must lie between 0 and 1"),
        ({"wording": "{answer}"}, r"holds \{reference\} 0 times"),
        ({}, "none of 2 judged cases is a YES: they cannot be balanced"),
    ],
)
def test_wrong_requests_write_nothing(tmp_path: Path, changes: dict, message: str):
    write_judged(tmp_path / "a.parquet", judged(0.1, 0.2))
    (tmp_path / "there.jsonl").touch()
    paths = {key: tmp_path / value for key, value in changes.items() if key in ("output", "held_out")}
    settings = {"inputs": (tmp_path / "a.parquet",), "output": tmp_path / "train.jsonl", **changes, **paths}
    with pytest.raises(RequestError, match=message):
        export_judged(Export(**settings))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "there.jsonl"]


def test_the_tool(tmp_path: Path):
    write_judged(tmp_path / "a.parquet", judged(0.9, 0.2, 0.4))
    tool = [sys.executable, ROOT / "tools" / "judge_data.py", tmp_path / "a.parquet", "-o", tmp_path / "t.parquet"]
    done = subprocess.run([*tool, "--targets", "soft"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("read 3, YES 1, NO 2, cases 2, examples 4\n")
    refused = subprocess.run([*tool, "--targets", "both"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2 and "--targets both must be hard or soft" in refused.stderr
