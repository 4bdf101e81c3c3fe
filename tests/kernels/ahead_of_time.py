"""Compile the row kernels for a card that is not there, as a launch would specialise them, and read what came out.

Run as a module (TRITON_INTERPRET unset): prints a table of the kernels for sm_90; given cases as JSON, one JSON object,
name of the case → what came out.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

import torch
import triton
from dapo_kernels import row_kernels
from dapo_kernels.triton_rows import FINISH_ROWS
from dapo_kernels.tuned import Tile, tile_for
from triton.backends.compiler import GPUTarget

CAPABILITY = {"sm_90": (9, 0), "sm_80": (8, 0), "sm_100": (10, 0), "gfx942": (9, 0)}
ROWS_OF = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _card(target: GPUTarget) -> str:
    return target.arch if target.backend == "hip" else f"sm_{target.arch}"


class StubDriver:
    """An active driver that only knows its target: enough for JITFunction.warmup()."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return sorted(CAPABILITY).index(_card(self.target))  # a launcher's cache is by device

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_device_interface(self):
        return None

    def map_python_to_cpp_type(self, name):
        return name


def activate(card: str) -> None:
    target = GPUTarget("hip", card, 64) if card.startswith("gfx") else GPUTarget("cuda", int(card[3:]), 32)
    triton.runtime.driver.set_active(StubDriver(target))


def tile_of(card: str, dtype: torch.dtype, columns: int, ranks: int) -> Tile:
    warp = 64 if card.startswith("gfx") else 32
    return tile_for(CAPABILITY[card], columns, dtype.itemsize, read_twice=ranks == 0, warp=warp)


def compiled(
    kernel: str, card: str, dtype: torch.dtype, columns: int, rows: int = 8192, valid: int | None = None,
    ranks: int = 8, entropy: bool = True,
):  # fmt: skip
    """The kernel as `triton_rows` would launch it on logits [rows, columns] of that dtype."""
    logits = torch.empty(1, dtype=dtype)
    tile = tile_of(card, dtype, columns, ranks if kernel == "clipped_loss_kernel" else 1)
    unit = tile.vector if columns % tile.vector == 0 else 1
    # per-row vectors may start anywhere: those of an odd N do not start on 16 bytes
    f32, i64, i32, u8 = (
        torch.empty(4, dtype=t)[rows % 2 :] for t in (torch.float32, torch.int64, torch.int32, torch.uint8)
    )
    units, valid = columns // unit, columns if valid is None else valid
    shape = {"VECS": tile.vectors, "LANES": tile.lanes, "VEC": tile.vector, "UNIT": unit}
    padded = {"PADDED": valid != columns}
    here = {"RANKS": ranks, "RANKS_POWER": max(1, ranks)}
    finishing = kernel == "logprobs_kernel" and ranks > 0
    if finishing:
        shape, padded = {"VECS": 1, "LANES": 1, "VEC": 1, "UNIT": 1}, {"PADDED": False}
    parts = f32 if ranks else None
    # one temperature for all rows, and a number to divide by: as in training
    arguments, constants = {
        "row_statistics_kernel": ((logits, i64, f32, None, f32, rows, units, valid, 0, 0, 1.0), shape | padded),
        "logprobs_kernel": (
            (None if finishing else logits, parts, i64, u8, None, f32, f32, f32, f32, i32, rows, units, valid, 0, valid,
             0, 1.0),
            shape | padded | here,
        ),
        "clipped_loss_kernel": (
            (logits, logits, parts, i64, f32, f32, f32, f32, None, None, f32, f32, u8, i32, rows, rows, units, valid, 0,
             valid, 0, 1.0, 7.0, 0.8, 1.28, 10.0, 0.01, 0.04),
            shape | padded | here | {"GRADIENT": True, "ENTROPY": entropy, "KL": 3},
        ),
        "row_gradient_kernel": (
            (logits, logits, f32, f32, f32, i64, u8, f32, f32, None, rows, units, valid, 0, valid, 0, 1.0),
            shape | padded,
        ),
        "scale_rows_kernel": ((logits, f32, rows, units), shape),
    }[kernel]  # fmt: skip
    per_program, warps = (FINISH_ROWS, 1) if finishing else (tile.rows, tile.warps)
    grid = (triton.cdiv(rows, per_program),)
    result = getattr(row_kernels, kernel).warmup(*arguments, grid=grid, ROWS=per_program, **constants, num_warps=warps)
    return result if hasattr(result, "asm") else result.result()


def resources(kernel, architecture: str) -> dict[str, int]:
    """Registers, stack, shared memory, spilled bytes and widths of global loads and stores of an NVIDIA kernel."""
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = os.path.join(folder, "k.cubin"), os.path.join(folder, "k.ptx")
        with open(cubin, "wb") as file:
            file.write(kernel.asm["cubin"])
        with open(ptx, "w") as file:
            file.write(kernel.asm["ptx"])
        usage = _output([_tool("cuobjdump"), "-res-usage", cubin])
        sass = _output([_tool("nvdisasm"), "-c", cubin])
        assembler = "ptxas-blackwell" if architecture.startswith("sm_1") else "ptxas"  # triton ships two
        verbose = _output([_tool(assembler), "-v", f"--gpu-name={architecture}", ptx, "-o", cubin + ".o"])
    registers, stack, shared = map(int, re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage).groups())
    spills = re.findall(r"(\d+) bytes spill", verbose)
    if len(spills) < 2 or "LDG" not in sass:
        raise SystemExit(f"the tools of this triton say nothing that can be read: {verbose[:500]}")
    return {
        "registers": registers,
        "stack": stack,
        "shared": max(shared, kernel.metadata.shared),
        "spilled": sum(map(int, spills)),
        "wide_loads": len(re.findall(r"LDG[.A-Z0-9]*\.128", sass)),
        "wide_stores": len(re.findall(r"STG[.A-Z0-9]*\.128", sass)),
        "local": len(re.findall(r"\b(?:LDL|STL)", sass)),
        "atomics": len(re.findall(r"\b(?:ATOM|RED)[.A-Z0-9]*\b", sass)),
        "wide_multiplies": len(re.findall(r"IMAD\.WIDE|mul\.(?:lo|wide)\.[su](?:64|32)", sass + kernel.asm["ptx"])),
        "exponentials": len(re.findall(r"MUFU\.EX2", sass)),
        "barriers_in_loops": _barriers_in_loops(kernel.asm["ptx"]),
        "loops": _instructions_of_loops(sass),
        "target_read_before_barrier": _target_read_before_barrier(sass),
    }


def _barriers_in_loops(ptx: str) -> int:
    """Barriers between a label and a later branch back to it."""
    lines = ptx.splitlines()
    labels = {m.group(1): i for i, line in enumerate(lines) if (m := re.match(r"(\$\w+):", line.strip()))}
    loops = [
        (labels[m.group(1)], i)
        for i, line in enumerate(lines)
        if (m := re.search(r"bra(?:\.uni)?\s+(\$\w+)", line)) and labels.get(m.group(1), i) < i
    ]
    return sum(any(a < i < b for a, b in loops) for i, line in enumerate(lines) if "bar.sync" in line)


def _target_read_before_barrier(sass: str) -> bool:
    """Whether a barrier stands between the narrow load of the target's logit and the first wide store."""
    lines = sass.splitlines()
    targets, barriers, stores = (
        [i for i, line in enumerate(lines) if re.search(pattern, line)]
        for pattern in (r"LDG\.E\.U16", r"BAR\.SYNC", r"STG[.A-Z0-9]*\.128")
    )
    return bool(targets and stores) and any(max(targets) < i < min(stores) for i in barriers)


def _instructions_of_loops(sass: str) -> list[int]:
    """Instructions of one trip through each loop over columns, where no branch within it is taken the rare way: what a
    predicated branch forward leaps over is not counted."""
    lines = sass.splitlines()
    labels = {m.group(1): i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_\w+):", line))}
    branches = [
        (i, labels[m.group(1)]) for i, line in enumerate(lines) if (m := re.search(r"\bBRA.*`\((\.L_\w+)\)", line))
    ]
    instructions = [bool(re.search(r"/\*[0-9a-f]{4,}\*/\s+\S", line)) for line in lines]
    found = []
    for end, start in branches:
        if start >= end or "LDG" not in "".join(lines[start:end]):
            continue
        leapt = {i for at, to in branches if start <= at < to <= end for i in range(at + 1, to)}
        found.append(sum(instructions[i] for i in range(start, end + 1) if i not in leapt))
    return sorted(found)


def _tool(name: str) -> str:
    return os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr


def report_of(case: dict) -> dict:
    """What came out of one case: "kernel", "card", "dtype", "columns"; maybe "valid", "ranks" and "entropy"."""
    activate(case["card"])
    dtype, ranks, entropy = ROWS_OF[case["dtype"]], case.get("ranks", 8), case.get("entropy", True)
    kernel = compiled(
        case["kernel"], case["card"], dtype, case["columns"], valid=case.get("valid"), ranks=ranks, entropy=entropy
    )
    if case["card"].startswith("gfx"):
        code = kernel.asm["amdgcn"]
        found = {
            key: int(m.group(1)) if (m := re.search(rf"\.{key}:\s*(\d+)", code)) else -1
            for key in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size", "vgpr_count")
        }
        found |= {"wide_loads": len(re.findall(r"(?:global|buffer)_load_dwordx4", code))}
    else:
        found = resources(kernel, case["card"] + ("a" if case["card"] != "sm_80" else ""))
    matrix = re.findall(r"tt\.addptr %(?:logits|gradient)_ptr, .*?, (?:tensor<\S+x)?(i\d+)", kernel.asm["ttir"])
    tile = tile_of(case["card"], dtype, case["columns"], ranks if case["kernel"] == "clipped_loss_kernel" else 1)
    return found | {
        "matrix_offsets": sorted(set(matrix)),
        "vectors_a_thread": tile.vectors,
        "elements_a_thread": tile.vectors * tile.vector,
        "warps": tile.warps,
    }


def compilations(case: dict) -> dict[str, int]:
    """How often a case's kernel is compiled for all of its "rows_list" and "columns_list"."""
    activate(case["card"])
    kernel, dtype = getattr(row_kernels, case["kernel"]), ROWS_OF[case["dtype"]]
    more = {"ranks": case.get("ranks", 8), "entropy": case.get("entropy", True)}
    before = sum(len(cache[0]) for cache in kernel.device_caches.values())
    for rows in case["rows_list"]:
        compiled(case["kernel"], case["card"], dtype, case["columns"], rows, **more)
    for columns in case.get("columns_list", []):
        compiled(case["kernel"], case["card"], dtype, columns, **more)
    return {"compilations": sum(len(cache[0]) for cache in kernel.device_caches.values()) - before}


def table(card: str = "sm_90") -> None:
    """The committed tiles in bf16, as docs/kernels.md has them."""
    print("| kernel | V | 16-byte loads a thread | warps | registers | spilled | instructions an element |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for columns in (152064, 19008):
        for kernel, title, ranks in (
            ("row_statistics_kernel", "statistics of a rank", 8),
            ("logprobs_kernel", "log-probs and entropy, vocabulary whole", 0),
            ("clipped_loss_kernel", "loss and gradient of a rank", 8),
            ("clipped_loss_kernel", "loss and gradient, vocabulary whole", 0),
            ("row_gradient_kernel", "gradient of log-probs and entropy", 8),
        ):
            case = {"kernel": kernel, "card": card, "dtype": "bf16", "columns": columns, "ranks": ranks}
            found = report_of(case)
            loops = " and ".join(f"{loop / found['elements_a_thread']:.1f}" for loop in found["loops"])
            cells = (found["vectors_a_thread"], found["warps"], found["registers"], found["spilled"], loops)
            print(f"| {title} | {columns} | " + " | ".join(map(str, cells)) + " |")


def main() -> None:
    if len(sys.argv) == 1:
        table()
        return
    cases = json.loads(sys.argv[1])
    report = {case["name"]: compilations(case) if case.get("rows_list") else report_of(case) for case in cases}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
