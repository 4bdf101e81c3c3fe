"""The kernels compiled for cards that are not there, in a process of its own: the interpreter's compiles nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
TWICE = "clipped_loss_kernel that reads its rows twice"
AT_ONCE = "logprobs_kernel of a vocabulary that is whole"
ROW_KERNELS = ("row_statistics_kernel", "clipped_loss_kernel", "row_gradient_kernel", "scale_rows_kernel")
WRITERS = ROW_KERNELS[1:]
OTHER_CARDS = ("sm_80", "sm_80, whole", "sm_100", "sm_100, whole")
ANY_ROWS = [1, 2, 16, 17, 8191, 65535, 65536, 70001]
# 65,536 registers: at most this many a thread keep 1,024 threads on a multiprocessor, in programs of any size
MOST_REGISTERS = {
    "row_statistics_kernel": 64,
    "clipped_loss_kernel": 64,
    "row_gradient_kernel": 64,
    "scale_rows_kernel": 48,
    "logprobs_kernel": 100,
}
# A multiprocessor of sm_90 issues 4 × 32 instructions a cycle. At 4.3 TB/s, 1.75 GHz and 132 of them it has 14 for each
# bf16 element that is read once, and 28 for one that is read and written.
MOST_INSTRUCTIONS = {"row_statistics_kernel": 9.5, "clipped_loss_kernel": 10.5, "row_gradient_kernel": 10.5}


def _cases() -> list[dict]:
    finish = {"kernel": "logprobs_kernel", "card": "sm_90", "dtype": "bf16", "columns": 8}
    cases = [
        finish | {"name": "logprobs_kernel, of any N", "rows_list": ANY_ROWS, "columns_list": [16, 19008]},
        finish | {"name": "logprobs_kernel"},
    ]
    for kernel in ROW_KERNELS:
        for name, more in {
            "whole": {"columns": 152064},
            "shard of 8": {"columns": 19008},
            "padded": {"columns": 19008, "valid": 18633},
            "odd": {"columns": 19001},
            **({"whole, padded": {"columns": 152064, "valid": 151936}} if kernel == "clipped_loss_kernel" else {}),
            **({"whole, odd": {"columns": 151937}} if kernel == "clipped_loss_kernel" else {}),
            **({"50257": {"columns": 50257}} if kernel == "clipped_loss_kernel" else {}),
            **({"sm_100, odd": {"columns": 151937, "card": "sm_100"}} if kernel == "clipped_loss_kernel" else {}),
            **({"gfx942, whole": {"columns": 152064, "card": "gfx942"}} if kernel == "clipped_loss_kernel" else {}),
            "fp32": {"columns": 19008, "dtype": "fp32"},
            "sm_80": {"columns": 19008, "card": "sm_80"},
            "sm_80, whole": {"columns": 152064, "card": "sm_80"},
            "sm_100": {"columns": 19008, "card": "sm_100"},
            "sm_100, whole": {"columns": 152064, "card": "sm_100"},
            "gfx942": {"columns": 19008, "card": "gfx942"},
            "of any N": {
                "columns": 19008, "dtype": "fp16", "rows_list": ANY_ROWS, "columns_list": [19016, 20000, 32000],
            },
        }.items():  # fmt: skip
            case = {"name": f"{kernel}, {name}", "kernel": kernel, "card": "sm_90", "dtype": "bf16"} | more
            cases.append(case)
            if kernel == "clipped_loss_kernel":
                cases.append(case | {"name": f"{TWICE}, {name}", "ranks": 0, "entropy": False})
    whole = finish | {"ranks": 0, "columns": 152064}
    for name, more in {
        "whole": {}, "shard of 8": {"columns": 19008}, "whole, padded": {"valid": 151936}, "odd": {"columns": 19001},
        "of any N": {"columns": 19008, "dtype": "fp16", "rows_list": ANY_ROWS, "columns_list": [19016, 32000]},
    }.items():  # fmt: skip
        cases.append(whole | more | {"name": f"{AT_ONCE}, {name}"})
    return cases


def _printed_by(module: str, *arguments: str, cache: Path) -> dict:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", f"tests.kernels.{module}", *arguments],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict[str, dict[str, int]]:
    return _printed_by("ahead_of_time", json.dumps(_cases()), cache=tmp_path_factory.mktemp("triton"))


def test_every_way_to_call_an_op_compiles(tmp_path):
    """The interpreter leaves out what a compiler sees: a pointer that is not given, in a branch that is not taken."""
    report = _printed_by("compiled_ops", cache=tmp_path)
    whole = {"clipped_loss_kernel", "logprobs_kernel", "row_gradient_kernel", "scale_rows_kernel"}
    assert len(report) == 15
    for way, kernels in report.items():
        assert set(kernels) == (whole if way.endswith("whole") else whole | {"row_statistics_kernel"}), way


@pytest.mark.parametrize("kernel", ROW_KERNELS)
@pytest.mark.parametrize("shape", ["whole", "shard of 8", "padded", "fp32", *OTHER_CARDS])
def test_wide_loads_and_nothing_spilled(report, kernel, shape):
    found = report[f"{kernel}, {shape}"]
    assert found["spilled"] == found["local"] == found["stack"] == found["atomics"] == 0, found
    assert found["wide_loads"] == found["vectors_a_thread"] >= 2, found
    if kernel in WRITERS:
        assert found["wide_stores"] == found["wide_loads"], found
    if kernel in ("clipped_loss_kernel", "row_gradient_kernel"):
        assert found["target_written_after_barrier"], "another thread may write there too"
    if shape not in OTHER_CARDS:
        assert found["registers"] <= MOST_REGISTERS[kernel], found


@pytest.mark.parametrize("kernel", ROW_KERNELS)
def test_rows_that_do_not_divide_into_16_bytes_are_not_read_16_bytes_at_a_time(report, kernel):
    found = report[f"{kernel}, odd"]
    assert found["wide_loads"] == found["wide_stores"] == 0, found
    assert found["spilled"] == found["local"] == 0, found


@pytest.mark.parametrize("shape", ["whole", "shard of 8", "whole, padded", "odd"])
def test_whole_log_probs_at_once(report, shape):
    found = report[f"{AT_ONCE}, {shape}"]
    assert found["spilled"] == found["local"] == found["stack"] == found["barriers_in_loops"] == 0, found
    assert found["wide_loads"] == (0 if shape == "odd" else found["vectors_a_thread"]), found
    if shape in ("whole", "shard of 8"):
        assert found["registers"] <= 64 and len(found["loops"]) == 1, found
        assert found["loops"][0] / found["elements_a_thread"] <= 9.5, found


@pytest.mark.parametrize("kernel", ROW_KERNELS)
def test_no_barrier_within_the_loop_over_columns(report, kernel):
    assert report[f"{kernel}, shard of 8"]["barriers_in_loops"] == 0


@pytest.mark.parametrize("shape", ["odd", "whole, odd", "50257", "sm_100, odd"])
def test_reading_an_odd_row_twice(report, shape):
    found = report[f"{TWICE}, {shape}"]
    assert found["spilled"] == found["local"] == found["wide_loads"] == found["wide_stores"] == 0, found


@pytest.mark.parametrize("shape", ["whole", "whole, padded", "shard of 8", "padded", "fp32", *OTHER_CARDS])
def test_reading_a_row_twice(report, shape):
    """Two loops over the row. A multiprocessor of sm_90 holds one long row at a time, so that the second reading may be
    one from the cache."""
    found = report[f"{TWICE}, {shape}"]
    assert found["spilled"] == found["local"] == found["stack"] == found["atomics"] == found["barriers_in_loops"] == 0
    assert found["wide_loads"] == 2 * found["vectors_a_thread"] >= 4, found
    assert found["wide_stores"] == found["vectors_a_thread"], found
    # one program of 1,024 threads, or two of any other size
    assert found["registers"] * 32 * found["warps"] * (1 if found["warps"] == 32 else 2) <= 65536, found
    assert len(found["loops"]) == 2
    assert found["target_read_before_barrier"], "the gradient may be written over it, in place"
    assert found["target_written_after_barrier"], "another thread may write there too"
    if shape == "whole":
        assert found["warps"] == 32 and found["registers"] > 32, found


@pytest.mark.parametrize("shape", ["whole", "shard of 8"])
@pytest.mark.parametrize("kernel", MOST_INSTRUCTIONS)
def test_instructions_an_element(report, kernel, shape):
    found = report[f"{kernel}, {shape}"]
    assert len(found["loops"]) == 1
    assert found["loops"][0] / found["elements_a_thread"] <= MOST_INSTRUCTIONS[kernel], found
    if kernel == "clipped_loss_kernel":
        first, second = report[f"{TWICE}, {shape}"]["loops"]
        each = report[f"{TWICE}, {shape}"]["elements_a_thread"]
        assert max(first, second) / each <= 9.5, (first, second, each)


def test_one_exponential_an_element(report):
    """Exponentials run at an eighth of the rate of additions: two an element would cost more time than the memory."""
    found = report["row_statistics_kernel, shard of 8"]
    elements = found["wide_loads"] * 8
    assert elements <= found["exponentials"] <= elements * 1.3, found
    found = report["row_gradient_kernel, shard of 8"]
    assert found["exponentials"] <= found["wide_loads"] * 8 + 2, found


@pytest.mark.parametrize("kernel", ROW_KERNELS)
def test_row_offsets_are_64_bit(report, kernel):
    """N × V passes 2³¹ at 14,123 rows of 152,064."""
    for shape in ("whole", "odd"):
        assert report[f"{kernel}, {shape}"]["matrix_offsets"] == ["i64"]


@pytest.mark.parametrize("kernel", [*ROW_KERNELS, "logprobs_kernel"])
def test_one_compilation_serves_every_number_of_rows_and_columns(report, kernel):
    assert report[f"{kernel}, of any N"]["compilations"] == 1
    assert report[f"{TWICE}, of any N"]["compilations"] == report[f"{AT_ONCE}, of any N"]["compilations"] == 1


@pytest.mark.parametrize("kernel", ROW_KERNELS)
def test_gfx942(report, kernel):
    found = report[f"{kernel}, gfx942"]
    for shape in ("gfx942", "gfx942, whole"):
        twice = report[f"{TWICE}, {shape}"]
        assert twice["vgpr_spill_count"] == twice["private_segment_fixed_size"] == 0, twice
        assert twice["warps"] * 64 <= 1024, "no card starts a larger program"
    assert found["vgpr_spill_count"] == found["sgpr_spill_count"] == found["private_segment_fixed_size"] == 0, found
    assert found["wide_loads"] == found["vectors_a_thread"], found


def test_the_kernel_without_a_row_loop(report):
    found = report["logprobs_kernel"]
    assert found["spilled"] == found["stack"] == 0 and found["registers"] <= MOST_REGISTERS["logprobs_kernel"]
