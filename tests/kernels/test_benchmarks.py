import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_benchmark_writes_its_table_and_picture(tmp_path):
    done = subprocess.run(
        [sys.executable, str(ROOT / "kernels" / "benchmarks" / "bench.py"), "--quick", "--output", str(tmp_path)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no GPU: small shapes, torch paths" in done.stdout
    with open(tmp_path / "cpu.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} == {
        "clipped loss + gradient", "log-probs", "linear loss + gradients", "linear log-probs",
    }  # fmt: skip
    assert {row["implementation"] for row in rows} == {"torch", "torch eager"}
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["times_floor"]) > 0 and row["torch"] and row["commit"]
        assert bool(row["achieved_TB_per_s"]) != bool(row["achieved_TFLOP_per_s"])
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part*"))
