"""Time, memory and the ceilings of the device at hand."""

import csv
import os
import platform
import subprocess
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

GPU_SECONDS_A_CASE = 1.5  # a GPU's repeats are cut to take about this long, but not below FEWEST
FEWEST, MOST = 3, 30
QUEUE_CYCLES = 4_000_000  # about 2 ms of GPU time


class Timing(NamedTuple):
    """Seconds a call (median, 20th and 80th percentile) and peak extra memory (bytes; NaN on a CPU)."""

    median_s: float
    p20_s: float
    p80_s: float
    peak_bytes: float


class Ceilings(NamedTuple):
    """What the device reaches in this very run: a copy's bytes read + written, a matmul's operations, a second."""

    copy_bytes_per_s: float
    matmul_flop_per_s: float


def timed(prepare: Callable[[int], tuple], operation: Callable[..., object], *, repeats: int, warm_up: int) -> Timing:
    """`operation(*prepare(i))` for i = 0, 1, …; only the operation is timed, and its result is dropped before the next.

    On a GPU: with at most `repeats` repeats, fewer where one takes long; with cold caches, whatever `prepare` left in
    them; and with the operation queued behind a pause, so that what counts is the device's time and not Python's,
    unless the operation itself waits for the device.
    """
    on_gpu = torch.cuda.is_available()
    seconds, peak = [], float("nan")
    i = 0
    while i < warm_up + repeats:
        arguments = prepare(i)
        if on_gpu:
            elapsed, peak = _on_gpu(operation, arguments)
            if 1 <= i < warm_up and elapsed > GPU_SECONDS_A_CASE / MOST:  # the first call may have compiled
                warm_up = i + 1
            if i == warm_up - 1:
                repeats = min(repeats, max(FEWEST, int(GPU_SECONDS_A_CASE / elapsed)))
        else:
            begin = time.perf_counter()
            operation(*arguments)
            elapsed = time.perf_counter() - begin
        del arguments
        if i >= warm_up:
            seconds.append(elapsed)
        i += 1
    seconds.sort()
    at = [seconds[min(len(seconds) - 1, int(len(seconds) * q))] for q in (0.5, 0.2, 0.8)]
    return Timing(*at, peak)


def _on_gpu(operation: Callable[..., object], arguments: tuple) -> tuple[float, float]:
    """(seconds, peak extra bytes) of one call."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    _eviction_buffer(torch.cuda.current_device()).max()  # reads alone: nothing is left to be written back later
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    torch.cuda._sleep(QUEUE_CYCLES)
    start.record()
    result = operation(*arguments)
    end.record()
    torch.cuda.synchronize()
    del result
    return start.elapsed_time(end) / 1e3, torch.cuda.max_memory_allocated() - held


@lru_cache(maxsize=1)
def _eviction_buffer(device: int) -> Tensor:
    """Four times the L2: reading it leaves nothing else there."""
    properties = torch.cuda.get_device_properties(device)
    l2_bytes = getattr(properties, "L2_cache_size", 0) or 128 << 20
    return torch.rand(l2_bytes, device=device)  # 4 bytes each


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Copy bandwidth over a buffer far larger than the caches, and the rate of a large square matmul."""
    on_gpu = device.type == "cuda"
    source = torch.randn((1 << 30) if on_gpu else (1 << 24), device=device, dtype=dtype)
    target = torch.empty_like(source)
    copy = timed(lambda _: (target, source), lambda t, s: t.copy_(s), repeats=20, warm_up=3)
    side = 8192 if on_gpu else 1024
    a, b = torch.randn(2, side, side, device=device, dtype=dtype)
    product = timed(lambda _: (a, b), torch.mm, repeats=20, warm_up=3)
    return Ceilings(2 * source.numel() * source.element_size() / copy.median_s, 2 * side**3 / product.median_s)


def conditions(device: torch.device) -> dict[str, str]:
    """Card, driver, versions and commit: what a number means nothing without. $BENCH_COMMIT names the commit where the
    code lies without its repository."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    card, driver = platform.processor() or platform.machine(), "none"
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        lines = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).splitlines()
        driver = lines[0] if lines else "unknown"
    return {
        "device": device.type,
        "card": card,
        "driver": driver,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": _output(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"])
        or os.environ.get("BENCH_COMMIT", "unknown"),
    }


def file_name(facts: dict[str, str]) -> str:
    """What the files of a machine are called: "cpu", or its card, as in "nvidia-h200"."""
    return facts["card"].lower().replace(" ", "-") if facts["device"] == "cuda" else "cpu"


def write_table(rows: list[dict[str, object]], path: Path) -> None:
    """A CSV with every column that a row has, written beside its final name and renamed."""
    beside = path.with_suffix(".csv.part")
    with open(beside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    os.replace(beside, path)


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or ""
    except (OSError, subprocess.TimeoutExpired):
        return ""
