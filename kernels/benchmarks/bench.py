"""Measure every op beside its floor and beside plain torch; print a table, write a CSV and a picture.

    python kernels/benchmarks/bench.py [--output FOLDER] [--quick]

On a GPU: N of 1k to 64k, V of 32000, 152064 and their tensor-parallel shards, H of 3584 and 5120, bf16. Without one:
small shapes and the torch paths, in fp32, which say nothing about the kernels' speed.
"""

import argparse
import csv
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from measure import Ceilings, Timing, ceilings, conditions, timed
from ops import Case, fused_linear, materialised

GPU_ROWS, CPU_ROWS = (1024, 4096, 8192, 16384, 65536), (256, 1024)
GPU_COLUMNS, CPU_COLUMNS = (32000, 152064, 19008, 38016), (2000, 8000)
GPU_WIDTHS, CPU_WIDTHS = (3584, 5120), (256,)
LARGEST_MATRIX_BYTES = 24 << 30  # of logits; longer batches would go in micro-batches


def cases(device: torch.device, limits: Ceilings, quick: bool) -> Iterator[Case]:
    """Every op over the device's shapes; a shape is made when its turn comes."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    rows, columns, widths = (GPU_ROWS, GPU_COLUMNS, GPU_WIDTHS) if on_gpu else (CPU_ROWS, CPU_COLUMNS, CPU_WIDTHS)
    if quick:
        rows, columns, widths = rows[:1], columns[:1], widths[:1]
    for n in rows:
        for v in columns:
            for mix in ("plain", "real"):
                if n * v * 2 <= LARGEST_MATRIX_BYTES:
                    yield from materialised(n, v, mix, dtype, device, limits)
                for h in widths if mix == "plain" else ():
                    yield from fused_linear(n, v, h, mix, dtype, device, limits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true", help="one shape, three calls each")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    limits, facts = ceilings(device, torch.bfloat16 if device.type == "cuda" else torch.float32), conditions(device)
    print(" · ".join(f"{key} {value}" for key, value in facts.items()))
    print(
        f"ceilings in this run: copy {limits.copy_bytes_per_s / 1e12:.3f} TB/s, "
        f"matmul {limits.matmul_flop_per_s / 1e12:.2f} TFLOP/s"
    )
    if device.type != "cuda":
        print("no GPU: small shapes, torch paths, fp32; the Triton kernels are not measured")
    rows = []
    print(
        f"{'operation':<24}{'by':<14}{'N':>7}{'V':>8}{'H':>6} {'mix':<6}{'median ms':>11}{'p20–p80':>19}{'× floor':>9}"
    )
    for case in cases(device, limits, options.quick):
        timing = measured(case, options.quick)
        if timing is not None:
            rows.append(facts | as_row(case, timing, limits))
            print(line(case, timing), flush=True)
    slug = facts["card"].lower().replace(" ", "-") if device.type == "cuda" else "cpu"
    options.output.mkdir(parents=True, exist_ok=True)
    table, picture = options.output / f"{slug}.csv", options.output / f"{slug}.png"
    write_table(rows, table)
    draw(rows, facts, picture)
    print(f"written: {table} and {picture}")


def measured(case: Case, quick: bool) -> Timing | None:
    """None, and a line that says so, where the device's memory does not hold it."""
    try:
        repeats, warm_up = (3, 1) if quick or not torch.cuda.is_available() else (30, 5)
        return timed(case.prepare, case.operation, repeats=repeats, warm_up=warm_up)
    except torch.OutOfMemoryError:
        print(f"{case.op:<24}{case.implementation:<14}{case.rows:>7}{case.columns:>8}{case.hidden:>6} out of memory")
        torch.cuda.empty_cache()
        return None


def as_row(case: Case, timing: Timing, limits: Ceilings) -> dict[str, object]:
    share = case.floor_s / timing.median_s
    linear = case.hidden > 0
    return {
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


def line(case: Case, timing: Timing) -> str:
    spread = f"{timing.p20_s * 1e3:.3f}–{timing.p80_s * 1e3:.3f}"
    return (
        f"{case.op:<24}{case.implementation:<14}{case.rows:>7}{case.columns:>8}{case.hidden or '':>6} {case.mix:<6}"
        f"{timing.median_s * 1e3:>11.3f}{spread:>19}{timing.median_s / case.floor_s:>9.2f}"
    )


def write_table(rows: list[dict[str, object]], path: Path) -> None:
    """Written beside its final name and renamed."""
    beside = path.with_suffix(".csv.part")
    with open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(beside, path)


def draw(rows: list[dict[str, object]], facts: dict[str, str], path: Path) -> None:
    """Bars: how many times the floor each case takes, grouped by operation."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plain = [row for row in rows if row["mix"] == "plain"]
    names = sorted({str(row["op"]) for row in plain})
    heights = [sum(row["op"] == name for row in plain) + 1 for name in names]
    size = (9, 1.2 + 0.28 * len(plain) + 0.8 * len(names))
    figure, axes = plt.subplots(len(names), 1, figsize=size, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axis, name in zip(axes[:, 0], names, strict=True):
        own = [row for row in plain if row["op"] == name]
        labels = [
            f"{row['implementation']}  N {row['N']}, V {row['V']}" + (f", H {row['H']}" if row["H"] else "")
            for row in own
        ]
        ours = ["#1f6f8b" if row["implementation"] in ("torch", "triton") else "#c9c9c9" for row in own]
        axis.barh(labels, [float(row["times_floor"]) for row in own], color=ours)
        axis.axvline(1.0, color="black", linewidth=0.8)
        axis.invert_yaxis()
        axis.set_title(f"{name}: times the floor ({own[0]['floor']})", fontsize=9, loc="left")
        axis.tick_params(labelsize=7)
    figure.suptitle(f"{facts['card']}, torch {facts['torch']}, triton {facts['triton']}, {facts['commit']}", fontsize=9)
    figure.tight_layout()
    beside = path.with_suffix(".part.png")
    figure.savefig(beside, dpi=130)
    plt.close(figure)
    os.replace(beside, path)


if __name__ == "__main__":
    main()
