"""The file of judged cases: each once, whole or not at all, gone on with after a resume."""

import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from dapo_megatron.config.reward import Judge, Reward
from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.files import locked
from dapo_megatron.rewards import judge_records
from dapo_megatron.rewards.grader import check_grader
from dapo_megatron.rewards.judge import JudgeReward
from dapo_megatron.rewards.judge_prompt import Case
from dapo_megatron.rewards.judge_records import COLUMNS, Judged, JudgeRecords, check_collect, read_judged, write_judged
from dapo_megatron.rewards.pool import GraderPool
from tests.rewards.judges import ScriptedJudge

P_YES = {"liver": 0.1, "blot": 0.9, "hm": math.nan, "lost": None, "half": 0.5}


def judged(answer: str, p_yes: float) -> Judged:
    return Judged(Case("q", answer, "r"), p_yes)


def test_a_run_collects_what_training_asked(tmp_path: Path):
    file = tmp_path / "run" / "judge.parquet"
    settings = Reward(grader="judge", judge=Judge(collect=str(file)))
    with GraderPool(1, 20.0) as pool:
        reward = JudgeReward(settings, ScriptedJudge(lambda case: P_YES[case.answer]), pool)
        responses = [f"Answer: {answer}" for answer in ("liver", "blot", "hm", "lost", "liver", "r")]
        reward.score(responses, ["r"] * 6, ["q"] * 6, collect=True)
        reward.score(["Answer: half"], ["r"], ["q"])  # of a validation
        assert not file.exists()
        reward.write_records()
        assert pyarrow.parquet.read_schema(file).names == list(COLUMNS)
        assert pyarrow.parquet.read_table(file).to_pylist() == [
            {"question": "q", "answer": "liver", "reference": "r", "verdict": "NO", "p_yes": 0.1},
            {"question": "q", "answer": "blot", "reference": "r", "verdict": "YES", "p_yes": 0.9},
        ]
        again = JudgeReward(settings, ScriptedJudge(lambda case: 0.3), pool)  # as after --resume
        again.score([*responses, "Answer: half"], ["r"] * 7, ["q"] * 7, collect=True)
        again.write_records()
    assert [(row.case.answer, row.p_yes) for row in read_judged(file)] == [
        ("liver", 0.1), ("blot", 0.9), ("hm", 0.3), ("lost", 0.3), ("half", 0.3),
    ]  # fmt: skip


def test_nothing_new_is_not_written_again(tmp_path: Path):
    records = JudgeRecords(tmp_path / "a.parquet")
    records.write()
    assert not (tmp_path / "a.parquet").exists()
    records.add([judged("a", 0.5)])
    records.write()
    before = os.stat(tmp_path / "a.parquet").st_ino
    records.add([judged("a", 0.9)])
    records.write()
    assert os.stat(tmp_path / "a.parquet").st_ino == before and len(records) == 1
    assert [row.verdict for row in read_judged(tmp_path / "a.parquet")] == ["NO"]


def test_two_runs_that_share_a_file_keep_each_others_verdicts(tmp_path: Path):
    file = tmp_path / "a.parquet"
    one, other = JudgeRecords(file), JudgeRecords(file)
    one.add([judged("a", 0.1), judged("b", 0.2)])
    one.write()
    other.add([judged("b", 0.9), judged("c", 0.3)])
    other.write()
    assert [(row.case.answer, row.p_yes) for row in read_judged(file)] == [("a", 0.1), ("b", 0.2), ("c", 0.3)]
    one.add([judged("d", 0.4)])
    one.write()
    assert [row.case.answer for row in read_judged(file)] == ["a", "b", "c", "d"]


def test_runs_that_write_at_the_same_time_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "a.parquet"
    runs = [JudgeRecords(file) for _ in range(4)]
    for number, run in enumerate(runs):
        run.add([judged(str(number), 0.5)])

    def slowly(path: Path, rows) -> None:  # what was read before is old by now, if others may write
        time.sleep(0.1)
        write_judged(path, rows)

    monkeypatch.setattr(judge_records, "write_judged", slowly)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(JudgeRecords.write, runs))
    assert {row.case.answer for row in read_judged(file)} == {"0", "1", "2", "3"}
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_that_another_run_does_not_let_go_of_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(judge_records, "LOCK_LIMIT_S", 0.1)
    records = JudgeRecords(tmp_path / "a.parquet")
    records.add([judged("a", 0.5)])
    (tmp_path / ".a.parquet.lock").touch()  # what a killed run leaves holds up nobody
    with (
        locked(tmp_path / "a.parquet", 1.0),
        pytest.raises(RunError, match=r"another process has had .*\.lock for 0\.1 s"),
    ):
        records.write()
    records.write()
    assert len(read_judged(tmp_path / "a.parquet")) == 1


def test_a_file_that_became_another_is_left_alone(tmp_path: Path):
    file = tmp_path / "a.parquet"
    records = JudgeRecords(file)
    file.write_text("no")
    records.add([judged("a", 0.5)])
    with pytest.raises(RunError, match=r"cannot be written: .* is no parquet file"):
        records.write()
    assert file.read_text() == "no"


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "a.parquet"
    records = JudgeRecords(file)
    records.add([judged("a", 0.5)])
    records.write()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    records.add([judged("b", 0.5)])
    with pytest.raises(RunError, match=r"a\.parquet cannot be written: .*No space left"):
        records.write()
    assert len(read_judged(file)) == 1 and [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def test_a_folder_that_may_not_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    check_collect(tmp_path / "new" / "a.parquet")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write everywhere
    with pytest.raises(RequestError, match=f"could not be written: {tmp_path} is no folder that may be written to"):
        check_collect(tmp_path / "new" / "a.parquet")


def test_other_files_are_refused_before_launch(tmp_path: Path):
    def refused(path: Path, message: str) -> None:
        settings = Judge(url="http://h/v1", model="m", collect=str(path))
        with pytest.raises(RequestError, match=message):
            check_grader(Reward(grader="judge", judge=settings))

    refused(tmp_path / "a.jsonl", r"must end in \.parquet")
    (tmp_path / "folder.parquet").mkdir()
    refused(tmp_path / "folder.parquet", "is a folder")
    (tmp_path / "text.parquet").write_text("no")
    refused(tmp_path / "text.parquet" / "a" / "b.parquet", r"text\.parquet is no folder that may be written to")
    refused(tmp_path / "text.parquet", "no parquet file")
    pyarrow.parquet.write_table(pyarrow.table({"question": ["q"], "answer": ["a"]}), tmp_path / "other.parquet")
    refused(tmp_path / "other.parquet", "holds the columns question, answer; a file of judged cases has question, ")
    rows = {"question": ["q"], "answer": ["a"], "reference": ["r"], "verdict": ["YES"], "p_yes": [1.5]}
    pyarrow.parquet.write_table(pyarrow.table(rows), tmp_path / "wild.parquet")
    with pytest.raises(RequestError, match=r"row 0 \(from 0\): .* is no judged case"):
        read_judged(tmp_path / "wild.parquet")
