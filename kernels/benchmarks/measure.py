"""Time, memory and the ceilings of the device at hand."""

import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch


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

    `prepare` refills what the operation overwrites and so also evicts it from the caches.
    """
    on_gpu = torch.cuda.is_available()
    seconds, peak = [], float("nan")
    for i in range(warm_up + repeats):
        arguments = prepare(i)
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            result = operation(*arguments)
            end.record()
            torch.cuda.synchronize()
            elapsed = start.elapsed_time(end) / 1e3
            peak = torch.cuda.max_memory_allocated() - held
        else:
            begin = time.perf_counter()
            result = operation(*arguments)
            elapsed = time.perf_counter() - begin
        del result
        if i >= warm_up:
            seconds.append(elapsed)
    seconds.sort()
    at = [seconds[min(len(seconds) - 1, int(len(seconds) * q))] for q in (0.5, 0.2, 0.8)]
    return Timing(*at, peak)


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
    """Card, driver, versions and commit: what a number means nothing without."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    card, driver = platform.processor() or platform.machine(), "none"
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]).splitlines()[0]
    return {
        "device": device.type,
        "card": card,
        "driver": driver,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": _output(["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]) or "unknown",
    }


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or ""
    except OSError:
        return ""
