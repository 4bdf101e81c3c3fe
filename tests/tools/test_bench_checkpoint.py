"""tools/bench_checkpoint.py saves both ways in turn and tells every save."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_both_ways_in_turn(tmp_path):
    size = ("--layers", "1", "--hidden", "192", "--saves", "1", "--output", str(tmp_path / "saves.csv"))
    command = [sys.executable, "-W", "ignore", "tools/bench_checkpoint.py", *size]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "training is held up" in found.stdout
    with open(tmp_path / "saves.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["way"], row["save"]) for row in rows] == [
        ("waiting", "0"), ("beside", "0"), ("waiting", "1"), ("beside", "1"),
    ]  # fmt: skip
    assert all(0 < float(row["held_s"]) <= float(row["whole_s"]) for row in rows)
    told = [rows[0][name] for name in ("machine", "cores", "load", "commit", "torch", "device", "dtype", "parameters")]
    assert all(told) and all(float(row["size_gb"]) > 0 for row in rows)
