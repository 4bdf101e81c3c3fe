"""How long a checkpoint holds up training: written beside it (`checkpoint.asynchronous`), and while it waits.

    python tools/bench_checkpoint.py [--layers 12] [--hidden 768] [--dtype bf16|fp32] [--saves 5] [--output FILE]

One rank with a Qwen2 model of random weights (110 M parameters unless told otherwise), its AdamW state and main
weights. Both ways take turns, so that a busy machine slows both; the first save of each, which gets its memory from the
system, is told apart and not counted. Each checkpoint is whole: shards, sums, flushed to disk, renamed.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402

from dapo_megatron.config import Layout  # noqa: E402
from dapo_megatron.config.architecture import architecture_from_dict  # noqa: E402
from dapo_megatron.config.checkpoint import Checkpoint  # noqa: E402
from dapo_megatron.config.optimizer import Optimizer  # noqa: E402
from dapo_megatron.launch import World  # noqa: E402
from dapo_megatron.learner.distributed import choose_device, join_world, leave_world  # noqa: E402
from dapo_megatron.learner.model import DTYPES  # noqa: E402
from dapo_megatron.learner.parallel_groups import form_groups  # noqa: E402
from tools.bench_record import machine, print_table, write_rows  # noqa: E402

VOCAB = 32768
WAYS = ("waiting", "beside")
LIMIT_S = 1800.0


@dataclass(frozen=True)
class Row:
    """One save; the machine's columns come last. held_s: seconds that training waited for it, whole_s: until the
    checkpoint had its name. save: 0 is the first, which is not counted. size_gb: of a checkpoint on disk."""

    way: str
    save: int
    held_s: float
    whole_s: float
    size_gb: float
    parameters: int
    dtype: str
    device: str
    torch: str
    machine: str
    cores: int
    load: float
    commit: str


def build_learner(layers: int, hidden: int, dtype: torch.dtype):
    """A learner with random weights on the only rank, its optimizer state filled."""
    from dapo_megatron.learner.learner import Learner

    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": hidden, "vocab_size": VOCAB,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "num_key_value_heads": max(1, hidden // 192),
        "intermediate_size": 3 * hidden, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "max_position_embeddings": 2048,
        "tie_word_embeddings": True, "use_sliding_window": False, "eos_token_id": 1,
    }  # fmt: skip
    architecture = architecture_from_dict(config, "bench")
    layout = Layout(
        world=1, tensor=1, pipeline=1, virtual_pipeline=1, context=1, data=1, sequence_parallel=False,
        layers_per_chunk=layers, mini_batch_prompts=1, updates_per_step=1, responses_per_step=1, padded_vocab=VOCAB,
    )  # fmt: skip
    form_groups(layout, seed=0, time_limit_s=LIMIT_S)
    learner = Learner(
        architecture, layout, dtype=dtype, device=choose_device("auto", 0), layer_spec="local",
        tokens_per_micro_batch=512, optimizer=Optimizer(learning_rate=1e-5),
    )  # fmt: skip
    for weight in learner.weights.values():
        weight.normal_(std=0.02)
    learner.optimizer.reload_model_params()
    return learner


def measure(learner, folder: Path, saves: int) -> list[Row]:
    """A row a save, both ways in turn."""
    from dapo_megatron.learner.checkpoint_saver import CheckpointSaver

    savers = {
        way: CheckpointSaver(Checkpoint(keep=1, asynchronous=way == "beside"), learner, folder / way, side_files=folder)
        for way in WAYS
    }
    told = {
        "parameters": sum(weight.numel() for weight in learner.weights.values()),
        "dtype": str(learner.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if learner.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        **machine(os.getloadavg()[0]),
    }
    rows: list[Row] = []
    for number in range(saves + 1):
        for way in WAYS:
            os.sync()  # what the other way left to be written
            started = time.perf_counter()
            savers[way].save({"step": number, "updates": 0})
            held = time.perf_counter() - started
            savers[way].wait()
            whole = time.perf_counter() - started
            size = sum(p.stat().st_size for p in (folder / way).rglob("*") if p.is_file()) / 1e9
            rows.append(Row(way, number, held, whole, size, **told))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=768, help="a multiple of 192")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--output", type=Path, help="CSV, a row a save")
    arguments = parser.parse_args()
    if arguments.saves < 1 or arguments.layers < 1 or arguments.hidden < 192 or arguments.hidden % 192:
        parser.error("--saves and --layers: at least 1; --hidden: a multiple of 192")
    folder = Path(tempfile.mkdtemp(prefix="bench-checkpoint-"))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    join_world(World(0, 1, 0), device=choose_device("auto", 0), time_limit_s=LIMIT_S)
    try:
        learner = build_learner(arguments.layers, arguments.hidden, DTYPES[arguments.dtype])
        rows = measure(learner, folder, arguments.saves)
    finally:
        leave_world()
        shutil.rmtree(folder, ignore_errors=True)
    lines = [(r.way, str(r.save), f"{r.held_s:.2f}", f"{r.whole_s:.2f}") for r in rows]
    print_table(("way", "save", "held up s", "written s"), lines)
    held = {way: statistics.median(r.held_s for r in rows if r.way == way and r.save) for way in WAYS}
    one = rows[-1]
    print(
        f"{one.parameters / 1e6:.0f} M parameters, {one.dtype}, {one.device}, {one.size_gb:.2f} GB a save; "
        f"medians of {arguments.saves} saves: training is held up {held['beside']:.2f} s when it goes on, "
        f"{held['waiting']:.2f} s when it waits: {held['beside'] / held['waiting']:.1%}"
    )
    if arguments.output is not None:
        write_rows(rows, arguments.output)
        print(f"written to {arguments.output}")


if __name__ == "__main__":
    main()
