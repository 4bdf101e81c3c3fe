import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "kernels" / "benchmarks"
STAND_INS = Path(__file__).parent / "stand_ins"
OPS = {"clipped loss + gradient", "log-probs", "linear loss + gradients", "linear log-probs"}


def bench(output: Path, *arguments: str, **environment: str) -> list[dict[str, str]]:
    """Rows of the CSV of a run without a GPU."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "bench.py"), "--quick", "--output", str(output), *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no GPU: small shapes" in done.stdout
    with open(output / "cpu.csv", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_benchmark_writes_its_table_and_picture(tmp_path):
    rows = bench(tmp_path)
    assert {row["op"] for row in rows} == OPS
    assert {"torch", "torch eager"} <= {row["implementation"] for row in rows}
    assert {row["mix"] for row in rows} == {"plain", "real"}
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert float(row["times_floor"]) > 0 and row["driver"] and row["torch"] and row["triton"] and row["commit"]
        assert bool(row["achieved_TB_per_s"]) != bool(row["achieved_TFLOP_per_s"])
        assert row["wanted_times_floor"] == row["reached"] == "", "nothing is asked of a CPU"
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part*"))
    more = bench(tmp_path, "--append", "--rows", "64", "--chunk-rows", "16", "2048", "64", "48", "100")
    assert more[: len(rows)] == rows and {row["N"] for row in more[len(rows) :]} == {"64"}
    # 2048, 64 and 100 rows a chunk all leave 64 rows whole, as the op's own size does
    by = [row["implementation"] for row in more[len(rows) :] if "chunk" in row["implementation"]]
    assert by[:2] == ["torch, chunk 16", "torch, chunk 48"]
    assert {row["op"] for row in more if row["implementation"] in by[:2]} == {"linear loss + gradients"}


def test_the_kernels_themselves_run_through_it_in_the_interpreter(tmp_path):
    """What a GPU does, but for events and the card's own numbers; with a Liger-Kernel that can be imported."""
    pytest.importorskip("triton")
    path = os.pathsep.join([str(STAND_INS), *filter(None, [os.environ.get("PYTHONPATH")])])
    rows = bench(tmp_path, "--rows", "16", "--columns", "256", "--hidden", "16", TRITON_INTERPRET="1", PYTHONPATH=path)
    assert {row["op"] for row in rows if row["implementation"] == "triton"} == OPS
    # a peer is only listed when its loss agrees with ours
    peers = {(row["op"], row["implementation"]) for row in rows if row["implementation"] != "triton"}
    assert peers == {
        ("clipped loss + gradient", "torch eager"), ("clipped loss + gradient", "liger"),
        ("linear loss + gradients", "torch eager"), ("linear loss + gradients", "liger, chunk 1"),
    }  # fmt: skip


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import bench
    import ops
    import targets

    return bench, ops, targets


def _row(op: str, by: str = "triton", **changes: object) -> dict[str, object]:
    linear = op.startswith("linear")
    return {
        "device": "cuda", "op": op, "implementation": by, "N": 8192, "V": 19008, "H": 5120 if linear else "",
        "mix": "plain", "median_ms": "1.0", "times_floor": "1.10", "peak_MiB": "10.0",
    } | changes  # fmt: skip


def test_what_is_asked_for_and_what_was_reached(benchmarks):
    _, _, targets = benchmarks
    rows = [
        _row("clipped loss + gradient", times_floor="1.16"),
        _row("clipped loss + gradient", "liger", median_ms="1.6"),
        _row("clipped loss + gradient", "liger", median_ms="0.1", V=152064),
        _row("log-probs", times_floor="1.15"),
        _row("linear loss + gradients"),
        _row("linear loss + gradients", "liger, chunk 1", median_ms="2.4"),
        _row("linear loss + gradients", "liger, chunk 8", median_ms="1.9"),
        _row("linear loss + gradients", N=16384, peak_MiB="257.0"),
        _row("linear loss + gradients", "triton, chunk 4096", N=16384, times_floor="9", peak_MiB="500.0"),
        _row("linear loss + gradients", "triton, chunk 4096", times_floor="9"),
        _row("linear log-probs", times_floor="1.11"),
        _row("linear log-probs", times_floor="9", H=3584),
        _row("log-probs", times_floor="9", mix="real"),
        _row("log-probs", "torch", times_floor="9", device="cpu"),
    ]
    found = [(v.found, v.reached) for v in targets.verdicts(rows)]
    assert found == [
        ("1.16 × the floor", False),
        ("1.60 × Liger's speed", True),
        ("10 MiB extra", True),
        ("1.15 × the floor", True),
        ("1.10 × the floor", True),
        ("1.90 × Liger's speed", False),
        ("257 MiB extra", False),
        ("1.11 × the floor", False),
    ]


def test_the_floor_counts_what_has_to_move(benchmarks):
    """Masked rows are only zeroed, clipped ones read once."""
    _, ops, _ = benchmarks
    from measure import Ceilings

    torch.manual_seed(0)
    limits = Ceilings(1e9, 1e9)
    by_mix = {}
    for mix in ("plain", "real"):
        cases = list(ops.materialised(4096, 64, mix, torch.float32, torch.device("cpu"), limits))
        by_mix[mix] = {case.op: case.floor_s for case in cases}
    row_s = 64 * 4 / 1e9
    assert by_mix["plain"] == pytest.approx({OP: k * 4096 * row_s for OP, k in (("clipped loss + gradient", 3),
                                                                                ("log-probs", 1))})  # fmt: skip
    assert by_mix["real"]["log-probs"] / 4096 / row_s == pytest.approx(0.7, abs=0.03)
    assert by_mix["real"]["clipped loss + gradient"] / 4096 / row_s == pytest.approx(2.4 - 0.007, abs=0.05)


def test_a_shape_that_does_not_fit_is_named_and_the_rest_goes_on(benchmarks, capsys):
    bench, ops, _ = benchmarks
    from measure import Ceilings

    facts = {"device": "cpu"}
    limits = Ceilings(1e9, 1e9)

    def full(*_: object):
        raise torch.OutOfMemoryError("no room")

    def build():
        first, *rest = ops.materialised(8, 16, "plain", torch.float32, torch.device("cpu"), limits)
        yield first._replace(operation=full)
        yield from rest

    assert [row["op"] for row in bench.measure_shape(("N 8", build), True, limits, facts)] == [
        "log-probs", "clipped loss + gradient",
    ]  # fmt: skip
    assert bench.measure_shape(("N 9", full), True, limits, facts) == []
    said = capsys.readouterr().out
    assert "N 8: does not fit" in said and "N 9: the inputs alone do not fit" in said


def test_a_peer_that_computes_something_else_is_left_out(benchmarks, capsys):
    bench, ops, _ = benchmarks
    from measure import Ceilings

    limits = Ceilings(1e9, 1e9)

    def build():
        *others, eager = ops.materialised(8, 16, "plain", torch.float32, torch.device("cpu"), limits)
        yield from others
        yield eager._replace(value=lambda: float("nan"))

    rows = bench.measure_shape(("N 8", build), True, limits, {"device": "cpu"})
    assert "torch eager" not in {row["implementation"] for row in rows} and "left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "calls", "median"),
    [
        ([9.0] + [0.001] * 50, 3 + 30, 0.001),  # the first call compiles
        ([0.1] * 50, 2 + 15, 0.1),
        ([3.0] * 50, 2 + 3, 3.0),
        ([1.0, 0.04, 0.04, 0.1, 0.3, 0.2] + [0.2] * 30, 3 + 30, 0.2),
    ],
)
def test_what_takes_long_on_a_gpu_is_repeated_less(benchmarks, monkeypatch, seconds, calls, median):
    import measure

    script = iter(seconds)
    made = []
    monkeypatch.setattr(measure.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(measure, "_on_gpu", lambda operation, arguments: (next(script), made.append(arguments) or 7))
    timing = measure.timed(lambda i: (i,), print, repeats=30, warm_up=3)
    assert made == [(i,) for i in range(calls)]
    assert timing.median_s == median and timing.peak_bytes == 7
