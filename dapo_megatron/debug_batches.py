"""Rollouts saved to files and learned from later, to debug one half of the loop without the other."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dapo_megatron.config.shape import SEGMENTED
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


def load_batches(files: Sequence[Path], *, shape: str) -> Iterator[list[PromptGroup]]:
    """The groups of each file, for a recipe of that `rollout.shape`.

    Raises:
        RequestError: a file that `save_batch` did not write, or wrote in a run of another shape.
    """
    for file in files:
        groups = load_groups(file)
        if any(bool(group.advantages) != (shape in SEGMENTED) for group in groups):
            drawn = "rollout.shape=independent" if shape in SEGMENTED else "rollout.shape=chain or tree"
            raise RequestError(
                f"--debug-train-only {file} was drawn with {drawn}, whose advantages are other ones than those of "
                f"rollout.shape={shape}; use a recipe with {drawn}, or draw anew by --debug-rollout-only"
            )
        yield groups
