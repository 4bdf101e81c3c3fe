"""A conversion stays within --max-memory whatever the size of the model; measured on a model three times as large."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors import safe_open

from dapo_megatron.config import read_architecture
from dapo_megatron.conversion import hf_writer
from dapo_megatron.conversion.streams import hashed_file
from dapo_megatron.resharding.hf_layout import read_headers
from tests.command_line import ROOT, environment

LIMIT_MIB = 512
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 1024, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 36864,
    "vocab_size": 152000, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 128,
    "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "bfloat16",
}  # fmt: skip

# the command line; VmHWM is the kernel's own peak of resident memory, mapped and shared pages included
MEASURED = """
import atexit, pathlib, re, sys
def tell(path=sys.argv.pop(1)):
    status = pathlib.Path("/proc/self/status").read_text()
    peak, anonymous = (int(re.search(key + r":\\s+(\\d+) kB", status)[1]) // 1024 for key in ("VmHWM", "RssAnon"))
    pathlib.Path(path).write_text(f"{peak} {anonymous}")
atexit.register(tell)
from dapo_megatron.cli import main
main()
"""


def write_large_model(folder):
    """1.5 GB and more of random bf16, written a piece at a time; two tensors of 311 MB."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    generator = np.random.default_rng(5)

    def draw(_, box):
        shape = [stop - start for start, stop in box]
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32)).bfloat16()

    plans = hf_writer.plan_files(read_architecture(folder), torch.bfloat16, 700 << 20)
    for plan in plans:
        with hashed_file(folder / plan.name, needed=plan.bytes, shown=folder / plan.name) as file:
            hf_writer.write_file(file, plan, draw, 16 << 20, lambda _: None)
    hf_writer.write_index(folder, plans)
    return sum(plan.bytes for plan in plans)


@pytest.mark.slow
def test_peak_memory(tmp_path):
    size = write_large_model(tmp_path / "hf")
    assert size > 1.5e9 > 2 * LIMIT_MIB * (1 << 20)
    steps = [
        ("hf-to-megatron", "hf", "wide", "parallel.tensor=4", "parallel.pipeline=2"),
        ("megatron-to-megatron", "wide", "narrow", "parallel.pipeline=4"),
        ("megatron-to-hf", "narrow", "back"),
        ("hf-to-hf", "back", "fp32", "--dtype", "fp32"),
    ]
    peaks = {}
    for kind, source, destination, *more in steps:
        result = subprocess.run(
            [
                *(sys.executable, "-c", MEASURED, str(tmp_path / "peak"), "convert", kind, str(tmp_path / source)),
                *(str(tmp_path / destination), *more, "--max-memory", f"{LIMIT_MIB}MiB"),
            ],
            cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        assert "verified" in result.stdout
        peaks[kind], anonymous = map(int, (tmp_path / "peak").read_text().split())
        print(kind, result.stdout.splitlines()[-2], f"VmHWM {peaks[kind]} MiB, RssAnon at exit {anonymous} MiB")
    assert max(peaks.values()) <= LIMIT_MIB, peaks
    name = "model.layers.3.mlp.down_proj.weight"
    bits = []
    for folder in ("hf", "back"):
        with safe_open(read_headers(tmp_path / folder)[name][0], framework="pt") as handle:
            bits.append(handle.get_tensor(name).view(torch.int16))
    assert torch.equal(*bits)
