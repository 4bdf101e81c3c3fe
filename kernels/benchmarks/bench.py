"""Measure every op beside its floor and its peers; print a table, write a CSV and a picture.

    python kernels/benchmarks/bench.py [--rows N …] [--columns V …] [--hidden H …] [--chunk-rows C …] [--append]
                                       [--output F] [--quick]

On a GPU: N of 1k to 64k, V of 32000, 152064 and their tensor-parallel shards, H of 3584 and 5120, bf16; parts of it
with --rows, --columns, --hidden and --append. Without one: small shapes and the torch paths, in fp32, which say nothing
about the kernels' speed. --chunk-rows measures our fused linear loss at these rows a chunk too, listed as "triton,
chunk C"; what is asked for is asked of the op's own size alone.
"""

import argparse
import csv
import gc
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from measure import MOST, Ceilings, Timing, ceilings, conditions, file_name, timed, write_table
from ops import LOSS_GAP, Case, fused_linear, materialised, own_implementation
from peers import has_liger
from picture import draw
from targets import verdicts, wanted_times_floor

GPU_ROWS, CPU_ROWS = (1024, 4096, 8192, 16384, 65536), (256, 1024)
GPU_COLUMNS, CPU_COLUMNS = (32000, 152064, 19008, 38016), (2000, 8000)
GPU_WIDTHS, CPU_WIDTHS = (3584, 5120), (256,)
MOST_ROWS_OF_A_REAL_LINEAR_MIX = 8192
Shape = tuple[str, Callable[[], Iterator[Case]]]


def shapes(device: torch.device, limits: Ceilings, options: argparse.Namespace) -> Iterator[Shape]:
    """(its name, what builds its cases) of every shape; nothing is allocated before that is called."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rows = options.rows or (GPU_ROWS if on_gpu else CPU_ROWS)
    columns = options.columns or (GPU_COLUMNS if on_gpu else CPU_COLUMNS)
    widths = options.hidden or (GPU_WIDTHS if on_gpu else CPU_WIDTHS)
    chunk_sizes = tuple(options.chunk_rows or ())
    if options.quick:
        rows, columns, widths = rows[:1], columns[:1], widths[:1]
    for v in columns:
        for n in rows:
            for mix in ("plain", "real"):
                yield f"N {n}, V {v}", partial(materialised, n, v, mix, dtype, device, limits)
                for h in widths if mix == "plain" or n <= MOST_ROWS_OF_A_REAL_LINEAR_MIX else ():
                    build = partial(fused_linear, n, v, h, mix, dtype, device, limits, chunk_sizes)
                    yield f"N {n}, V {v}, H {h}", build


def measure_shape(shape: Shape, quick: bool, limits: Ceilings, facts: dict[str, str]) -> list[dict[str, object]]:
    """Rows of the CSV, each printed as soon as it is known; a line where something does not fit into memory."""
    name, build = shape
    rows: list[dict[str, object]] = []
    repeats, warm_up = (3, 1) if quick or facts["device"] != "cuda" else (MOST, 3)
    our_loss: float | None = None
    try:
        for case in build():
            try:
                if case.value is not None:
                    value = case.value()
                    our_loss = value if our_loss is None else our_loss
                    if not abs(value - our_loss) <= LOSS_GAP:
                        print(f"{case.op} by {case.implementation}, {name}: loss {value}, ours {our_loss}: left out")
                        continue
                timing = timed(case.prepare, case.operation, repeats=repeats, warm_up=warm_up)
            except torch.OutOfMemoryError:
                print(f"{case.op} by {case.implementation}, {name}: does not fit into the memory of this device")
                torch.cuda.empty_cache()
                continue
            rows.append(facts | as_row(case, timing, limits, facts))
            print(line(case, timing, rows[-1]), flush=True)
    except torch.OutOfMemoryError:
        print(f"{name}: the inputs alone do not fit into the memory of this device")
    return rows


def as_row(case: Case, timing: Timing, limits: Ceilings, facts: dict[str, str]) -> dict[str, object]:
    share = case.floor_s / timing.median_s
    linear = case.hidden > 0
    row: dict[str, object] = {
        "op": case.op,
        "implementation": case.implementation,
        "N": case.rows,
        "V": case.columns,
        "H": case.hidden or "",
        "mix": case.mix,
        "median_ms": f"{timing.median_s * 1e3:.4f}",
        "p20_ms": f"{timing.p20_s * 1e3:.4f}",
        "p80_ms": f"{timing.p80_s * 1e3:.4f}",
        "achieved_TB_per_s": "" if linear else f"{share * limits.copy_bytes_per_s / 1e12:.4f}",
        "achieved_TFLOP_per_s": f"{share * limits.matmul_flop_per_s / 1e12:.4f}" if linear else "",
        "floor": case.floor,
        "times_floor": f"{1 / share:.3f}",
        "peak_MiB": "" if math.isnan(timing.peak_bytes) else f"{timing.peak_bytes / 2**20:.1f}",
        "copy_TB_per_s": f"{limits.copy_bytes_per_s / 1e12:.4f}",
        "matmul_TFLOP_per_s": f"{limits.matmul_flop_per_s / 1e12:.4f}",
    }
    wanted = wanted_times_floor(facts | row)
    reached = "" if wanted is None else "yes" if 1 / share <= wanted else "no"
    return row | {"wanted_times_floor": wanted or "", "reached": reached}


def line(case: Case, timing: Timing, row: dict[str, object]) -> str:
    spread = f"{timing.p20_s * 1e3:.3f}–{timing.p80_s * 1e3:.3f}"
    achieved = f"{row['achieved_TFLOP_per_s']} TFLOP/s" if case.hidden else f"{row['achieved_TB_per_s']} TB/s"
    return (
        f"{case.op:<24}{case.implementation:<16}{case.rows:>7}{case.columns:>8}{case.hidden or '':>6} {case.mix:<6}"
        f"{timing.median_s * 1e3:>11.3f}{spread:>19}{achieved:>18}{row['peak_MiB']:>10}"
        f"{timing.median_s / case.floor_s:>9.2f} {row['reached']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="one shape, three calls each")
    parser.add_argument("--rows", type=int, nargs="+", help="only these N")
    parser.add_argument("--columns", type=int, nargs="+", help="only these V")
    parser.add_argument("--hidden", type=int, nargs="+", help="only these H")
    parser.add_argument("--chunk-rows", type=int, nargs="+", help="our fused linear loss at these rows a chunk too")
    parser.add_argument("--append", action="store_true", help="keep the rows that the CSV already has")
    options = parser.parse_args()
    for name in ("rows", "columns", "hidden", "chunk_rows"):
        if min(getattr(options, name) or (1,)) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    limits, facts = ceilings(device, torch.bfloat16 if device.type == "cuda" else torch.float32), conditions(device)
    print(" · ".join(f"{key} {value}" for key, value in facts.items()))
    print(
        f"ceilings in this run: copy {limits.copy_bytes_per_s / 1e12:.3f} TB/s, "
        f"matmul {limits.matmul_flop_per_s / 1e12:.2f} TFLOP/s"
    )
    if device.type != "cuda":
        what = "the Triton kernels in their interpreter" if own_implementation(device) == "triton" else "torch paths"
        print(f"no GPU: small shapes, {what}, fp32; the Triton kernels are not measured")
    if not has_liger():
        print("liger_kernel is not installed: no such peer")
    print(
        f"{'operation':<24}{'by':<16}{'N':>7}{'V':>8}{'H':>6} {'mix':<6}{'median ms':>11}{'p20–p80':>19}"
        f"{'achieved':>18}{'peak MiB':>10}{'× floor':>9}"
    )
    options.output.mkdir(parents=True, exist_ok=True)
    table, picture = (options.output / f"{file_name(facts)}.{kind}" for kind in ("csv", "png"))
    rows: list[dict[str, object]] = []
    if options.append and table.exists():
        with open(table, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    for shape in shapes(device, limits, options):
        rows += measure_shape(shape, options.quick, limits, facts)
        gc.collect()
        if rows:
            write_table(rows, table)  # after every shape: a run that is cut short has its numbers
    for verdict in verdicts(rows):
        print(f"{'reached' if verdict.reached else 'MISSED '} {verdict.what}: {verdict.found}, wanted {verdict.wanted}")
    print(
        f"written: {table}" + (f" and {picture}" if draw(rows, facts, picture) else "; no picture without matplotlib")
    )


if __name__ == "__main__":
    main()
