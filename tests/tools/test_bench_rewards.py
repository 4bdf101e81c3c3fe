"""tools/bench_rewards.py measures what it says: every verdict checked, one line a task and place."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dapo_megatron.errors import RunError
from tools import bench_rewards


def test_every_task_is_measured_and_written(tmp_path: Path):
    rows = [bench_rewards.measure(task, "this process", 1) for task in bench_rewards.tasks(8)]
    assert [(row.task.split(",")[0], row.items) for row in rows] == [
        ("integers", 8), ("integers", 1), ("LaTeX", 8), ("code tests", 10), ("code tests", 10),
    ]  # fmt: skip
    assert all(row.per_second == row.items / row.seconds and row.per_cpu_second > 0 for row in rows)
    bench_rewards.write_rows(rows, tmp_path / "r.csv")
    with open(tmp_path / "r.csv", newline="") as file:
        assert [row["task"] for row in csv.DictReader(file)] == [row.task for row in rows]


def test_a_wrong_verdict_is_no_measurement():
    task = next(bench_rewards.tasks(8))
    with pytest.raises(RunError, match="1 verdicts are wrong"):
        bench_rewards.measure(replace(task, right=[not task.right[0], *task.right[1:]]), "this process", 1)


def test_wrong_requests_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["bench_rewards.py", "--repeats", "0"])
    with pytest.raises(SystemExit) as stopped:
        bench_rewards.main()
    assert stopped.value.code == 2 and "--repeats 0: at least 1" in capsys.readouterr().err
