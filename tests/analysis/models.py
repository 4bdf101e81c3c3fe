"""Tiny models with random weights that the tests of this folder look at."""

from pathlib import Path

from dapo_megatron.config.model import Scratch
from dapo_megatron.scratch import build_scratch_model

SHAPE = Scratch(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, ffn=48, max_positions=64, init_std=0.3)


def write_tiny(folder: Path, *, seed: int) -> Path:
    """A Hugging Face folder with the tokenizer of the arithmetic task."""
    build_scratch_model(folder, SHAPE, seed=seed)
    return folder
