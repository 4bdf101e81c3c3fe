"""Batches for tests of the learner: drawn at random, written to files and read on ranks."""

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from dapo_megatron.data.records import SequenceBatch, sequence_batch


def random_batch(shapes: Sequence[tuple[int, int]], *, seed: int, old: tuple[float, float] = (-4, 1)) -> SequenceBatch:
    """Sequences of (prompt, response) tokens below 100; normal advantages, and old log-probs about `old` (mean, σ)."""
    generator = np.random.default_rng(seed)
    prompts, responses = (
        [generator.integers(0, 100, n, dtype=np.int32) for n in part] for part in zip(*shapes, strict=True)
    )
    batch = sequence_batch(prompts, responses)
    batch.advantages = [normal(generator, r) for r in responses]
    batch.old_logprobs = [old[0] + np.float32(old[1]) * normal(generator, r) for r in responses]
    return batch


def normal(generator: np.random.Generator, like: np.ndarray) -> np.ndarray:
    """fp32, as many as `like` has."""
    return generator.standard_normal(len(like), dtype=np.float32)


def save_batch(batch: SequenceBatch, path: str | Path) -> str:
    """Write it for `load_batch`; returns the path."""
    columns = {f.name: getattr(batch, f.name) for f in fields(batch)}
    arrays = {
        f"{name}.{i}": np.ascontiguousarray(values)
        for name, column in columns.items()
        if column is not None
        for i, values in enumerate(column)
    }
    save_file(arrays, path)
    return str(path)


def load_batch(path: str | Path) -> SequenceBatch:
    """A batch that `save_batch` wrote."""
    columns: dict[str, dict[int, np.ndarray]] = {}
    for name, values in load_file(path).items():
        column, _, number = name.rpartition(".")
        columns.setdefault(column, {})[int(number)] = values
    return SequenceBatch(**{name: [column[i] for i in range(len(column))] for name, column in columns.items()})
