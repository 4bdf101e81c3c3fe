"""`make bench-learner` on a CPU: a small run of its own, and the numbers that it derives."""

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dapo_megatron.config.architecture import architecture_from_dict
from dapo_megatron.errors import RunError

ROOT = Path(__file__).parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench_learner.py"), *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def tool():
    before = list(sys.path)
    sys.path.insert(0, str(ROOT / "tools"))
    yield importlib.import_module("bench_learner")
    sys.path[:] = before


@pytest.mark.distributed
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_both_sides_take_the_same_steps_and_are_written_down(tmp_path, recompute):
    done = bench(
        "--layers", "2", "--tokens", "256", "--repeats", "1", "--recompute", recompute, "--output", str(tmp_path)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "this is the CPU" in done.stdout and "2 of 4 layers" in done.stdout
    with open(tmp_path / "learner-cpu.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(row["by"], row["settings"]) for row in rows] == [
        ("ours", "loss_kernel=torch fused_linear_loss=false"),
        ("ours", "loss_kernel=torch fused_linear_loss=true"),
        ("transformers", "attention=sdpa, torch loss"),
        ("transformers", "attention=packed, torch loss"),
    ]
    for row in rows:
        assert 240 <= int(row["tokens"]) <= 256
        assert row["card"] and row["driver"] and row["torch"] and row["triton"] and row["commit"]
        assert float(row["tokens_per_s"]) == pytest.approx(int(row["tokens"]) / float(row["median_ms"]) * 1e3, rel=0.01)
        assert float(row["model_flop_utilisation"]) > 0 and row["recompute"] == recompute
        assert float(row["gradient_norm"]) == pytest.approx(float(rows[0]["gradient_norm"]), rel=1e-4)
        assert float(row["first_loss"]) == pytest.approx(float(rows[0]["first_loss"]), abs=2e-6)
    assert max(float(row["times_best_peer"]) for row in rows[2:]) == 1.0


def test_a_shape_for_a_gpu_is_refused_on_a_cpu(tmp_path):
    done = bench("--shape", "7b", "--output", str(tmp_path))
    assert done.returncode == 2 and done.stderr.strip().endswith("use --shape tiny")
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


def test_nothing_is_compared_when_a_contender_computes_something_else(tool):
    first = {"side": "ours", "settings": "a", "losses": (0.5, 0.4), "norm": 2.0}
    tool.check_agreement([first, {"side": "theirs", "settings": "b"}], torch.float32)
    tool.check_agreement([first, first | {"norm": 2.0001, "losses": (0.50001, 0.4)}], torch.float32)
    for other in ({"losses": (0.501, 0.4)}, {"losses": (0.5, 0.401)}, {"norm": 2.01}, {"norm": float("nan")}):
        with pytest.raises(RunError, match="do not compute the same"):
            tool.check_agreement([first, first | other], torch.float32)


def test_operations_of_a_step_are_those_of_its_products(tool):
    """Counted one product at a time: 2·m·n·k forward and twice that backward."""
    shape = tool.SHAPES["tiny"]
    lengths = [5, 17]
    for tied in (True, False):
        config = tool.model_config(shape, 3) | {"tie_word_embeddings": tied}
        architecture = architecture_from_dict(config, "a test")
        hidden, ffn, head_dim = shape.hidden, shape.ffn, shape.hidden // shape.heads
        kv = shape.kv_heads * head_dim
        a_token = 3 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn) + hidden * shape.vocab
        attention = 3 * sum(2 * n * n / 2 * hidden * 2 for n in (5, 17))
        wanted = 3 * (2 * a_token * 22 + attention)
        found = tool.flop_of_a_step(architecture, lengths)
        assert wanted <= found <= 1.01 * wanted  # norms and biases are counted with the parameters


def test_lengths_fill_the_budget_and_vary(tool):
    shape = tool.SHAPES["7b"]
    lengths = tool.packed_lengths(shape, 16384)
    assert 16384 - 8 < sum(p + r for p, r in lengths) <= 16384
    assert all(p > 0 and 0 < p + r <= shape.longest for p, r in lengths)
    responses = sorted(r for _, r in lengths)
    assert responses[-1] > 3 * responses[0]


def test_as_many_layers_as_fit(tool):
    shape = tool.SHAPES["7b"]
    most = [tool.layers_that_fit(shape, 16384, gib * 2**30, "none") for gib in (16, 80, 141, 400, 4000)]
    assert most == sorted(most) and most[0] == 1 and most[-1] == 28 and most[2] > most[1]
    assert tool.layers_that_fit(shape, 16384, 141 * 2**30, "full") > most[2]
