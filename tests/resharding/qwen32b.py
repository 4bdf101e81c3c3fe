"""Qwen2.5-32B as its config.json tells it; run as a program, the plan of the paper's scale in a process of its own.

Imports no torch, whose memory would hide the plan's.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path

from dapo_megatron.config import Architecture, Recipe, derive_layout
from dapo_megatron.config.architecture import architecture_from_dict
from dapo_megatron.resharding.layout import volume
from dapo_megatron.resharding.megatron_layout import megatron_layout
from dapo_megatron.resharding.messages import messages_of
from dapo_megatron.resharding.plan import make_plan
from dapo_megatron.resharding.vllm_layout import vllm_layout

CONFIG = {
    "model_type": "qwen2",
    "hidden_size": 5120,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "intermediate_size": 27648,
    "vocab_size": 152064,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
    "eos_token_id": 151643,
}
SECTIONS = {
    "run": {"directory": "runs/paper"},
    "parallel": {"tensor": 8, "pipeline": 4, "world": 128},
    "rollout": {"engine": "vllm", "tensor": 8},
}
BF16 = 2


def qwen32b() -> Architecture:
    return architecture_from_dict(CONFIG, "Qwen2.5-32B")


def write_config(folder: Path) -> Path:
    """A folder with config.json and nothing else."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def at_scale(engine_tensor: int) -> dict:
    """128 learner ranks (TP8 x PP4 x DP4) to 128 workers: what planning took and what came out."""
    a = qwen32b()
    layout = derive_layout(Recipe.model_validate({**SECTIONS, "model": {"path": "unread"}}), a)
    started = time.perf_counter()
    source = megatron_layout(a, layout)
    target = vllm_layout(a, engines=128 // engine_tensor, tensor=engine_tensor, first_rank=128)
    plan = make_plan(source, target)
    messages = messages_of(plan, itemsize=BF16, bucket_bytes=256 << 20)
    seconds = time.perf_counter() - started
    peak = _peak_bytes()
    received, sent = Counter(), Counter()
    for message in messages:
        received[message.target_rank] += message.elements
        sent[message.source_rank] += message.elements
    kinds = Counter("direct" if message.direct else "bucket" for message in messages)
    return {
        "seconds": seconds,
        "peak_bytes": peak,
        "torch": "torch" in sys.modules,
        "moves": len(plan.moves),
        "moves_of_a_worker": sorted(set(Counter(move.target_rank for move in plan.moves).values())),
        "wanted": {rank: sum(volume(p.box) for p in placed) for rank, placed in target.placements.items()},
        "received": received,
        "sent": sent,
        "messages": kinds,
        "packed_elements": sum(move.elements for move in plan.moves if not move.contiguous),
    }


def _peak_bytes() -> int:
    """Peak memory of this program; getrusage would count the one that started it as well."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")))


if __name__ == "__main__":
    print(json.dumps(at_scale(int(sys.argv[1]))))
