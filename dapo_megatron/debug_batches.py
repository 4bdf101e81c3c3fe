"""Rollouts saved to files and learned from later, to debug one half of the loop without the other."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dapo_megatron.data.completions import PromptGroup
from dapo_megatron.data.group_files import load_groups, save_groups
from dapo_megatron.errors import RequestError

if TYPE_CHECKING:
    from dapo_megatron.assemble import Run


def save_batch(run: "Run", groups: Sequence[PromptGroup]) -> Path | None:
    """Write the groups of the present step to RUN/debug/rollout-NNNNNN.safetensors (rank 0)."""
    if run.world.rank != 0 or not groups:
        return None
    path = run.paths.run / "debug" / f"rollout-{run.step + 1:06d}.safetensors"
    save_groups(path, groups)
    return path


def find_batches(path: Path) -> list[Path]:
    """The file itself, or all rollout files of a folder in step order. Raises RequestError when there is none."""
    files = sorted(path.glob("rollout-*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise RequestError(f"--debug-train-only {path}: no rollout file there; --debug-rollout-only writes RUN/debug/")
    return files


def load_batches(files: Sequence[Path]) -> Iterator[list[PromptGroup]]:
    """The groups of each file. Raises RequestError for a file that `save_batch` did not write."""
    yield from map(load_groups, files)
