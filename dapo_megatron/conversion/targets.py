"""What a conversion writes: the files of a Hugging Face folder or of a Megatron checkpoint, and what completes them."""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from dapo_megatron.config import Layout
from dapo_megatron.conversion import hf_writer, shard_writer
from dapo_megatron.conversion.names import object_names, owned_boxes, positions, stage_layers, stored_shapes
from dapo_megatron.conversion.regions import cut_box
from dapo_megatron.conversion.shard_writer import Piece, Written
from dapo_megatron.conversion.sources import Source, open_hugging_face, open_megatron, weight_name
from dapo_megatron.conversion.workspace import Workspace
from dapo_megatron.files import HashedFile, write_text_atomically
from dapo_megatron.learner.manifest import CRITIC, MANIFEST, UPDATES, read_state, write_manifest
from dapo_megatron.resharding.hf_files import copy_side_files, dtype_name


@dataclass(frozen=True, slots=True)
class TargetFile:
    """A large file: its name within the destination, and about how many bytes."""

    name: str
    bytes: int


class Target(Protocol):
    """A destination: large files, written and recorded one by one, and small ones at the end."""

    files: list[TargetFile]

    def write(self, index: int, file: HashedFile, on_bytes: Callable[[int], None]) -> dict[str, Any]:
        """Write the `index`-th file; returns what `finish` has to know about it, JSON-able."""

    def finish(self, workspace: Workspace) -> None:
        """Write all that is small, once every file is there."""

    def open(self, content: Path) -> Source:
        """Read it back."""


class HuggingFaceTarget:
    """safetensors files of at most `file_size` bytes, config.json and tokenizer."""

    def __init__(self, source: Source, dtype: torch.dtype, *, file_size: int, piece_bytes: int) -> None:
        self.source, self.dtype, self.piece_bytes = source, dtype, piece_bytes
        self.plans = hf_writer.plan_files(source.architecture, dtype, file_size)
        self.files = [TargetFile(plan.name, plan.bytes) for plan in self.plans]

    def write(self, index: int, file: HashedFile, on_bytes: Callable[[int], None]) -> dict[str, Any]:
        """See Target."""
        hf_writer.write_file(file, self.plans[index], self.source.canonical, self.piece_bytes, on_bytes)
        return {}

    def finish(self, workspace: Workspace) -> None:
        """See Target."""
        hf_writer.write_index(workspace.content, self.plans)
        critic = self.source.architecture.value_head
        copy_side_files(self.source.side_files, workspace.content, self.dtype, value_head=critic)

    def open(self, content: Path) -> Source:
        """See Target."""
        return open_hugging_face(content, critic=self.source.architecture.value_head)


class MegatronTarget:
    """One shard file a model-parallel position, as the learner's checkpoints have them.

    Args:
        source_folder: the checkpoint that common.pt and state.json come from; None for a Hugging Face source.
        optimizer: whether optimizer state is carried over.
    """

    def __init__(
        self,
        source: Source,
        layout: Layout,
        dtype: torch.dtype,
        *,
        piece_bytes: int,
        source_folder: Path | None,
        optimizer: bool,
    ) -> None:
        self.source, self.dtype, self.source_folder, self.optimizer = source, dtype, source_folder, optimizer
        self.pieces = _shards(source, layout, dtype, piece_bytes, optimizer=optimizer)
        self.files = [
            TargetFile(f"shards/{shard_writer.shard_name(i)}", sum(p.bytes + shard_writer.OVERHEAD_BYTES for p in part))
            for i, part in enumerate(self.pieces)
        ]
        self._empty = shard_writer.empty_object()

    def write(self, index: int, file: HashedFile, on_bytes: Callable[[int], None]) -> dict[str, Any]:
        """See Target."""
        read_object = self.source.object_bytes if self.source.objects else lambda _: self._empty
        written = shard_writer.write_shard(file, self.pieces[index], self.source.stored, read_object, on_bytes)
        return {"pieces": [[at.offset, at.length] for at in written]}

    def finish(self, workspace: Workspace) -> None:
        """See Target."""
        content, shards = workspace.content, workspace.content / "shards"
        places = [[Written(*at) for at in workspace.finished[file.name]["pieces"]] for file in self.files]
        shard_writer.write_index(shards, self.pieces, places)
        state: dict[str, Any] = {"step": 0, "updates": 0}
        if self.source_folder is not None:
            # random states of each rank, kept groups and a critic are left behind, and what is known of them
            left = ("layout", "groups", UPDATES[CRITIC])
            state = {k: v for k, v in read_state(self.source_folder).items() if k not in left}
        if self.optimizer and self.source_folder is not None:
            shutil.copyfile(self.source_folder / "shards" / shard_writer.COMMON, shards / shard_writer.COMMON)
        else:
            shard_writer.write_common(shards)
        (content / "hf").mkdir(exist_ok=True)
        copy_side_files(self.source.side_files, content / "hf", self.dtype)
        state["dtype"] = dtype_name(self.dtype)
        write_text_atomically(content / "state.json", json.dumps(state, indent=2))
        known = {name: entry["sha256"] for name, entry in workspace.finished.items()}
        write_manifest(content, known)

    def open(self, content: Path) -> Source:
        """See Target."""
        return open_megatron(content)


def source_stamp(source: Source, source_folder: Path | None) -> str:
    """Tells whether a source is still the same: its manifest's SHA-256, or sizes and times of its files."""
    if source_folder is not None:
        return hashlib.sha256((source_folder / MANIFEST).read_bytes()).hexdigest()
    paths = {region.path for tensor in source.files.tensors.values() for region in tensor.regions}
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(paths)]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def _shards(
    source: Source, layout: Layout, dtype: torch.dtype, piece_bytes: int, *, optimizer: bool
) -> list[list[Piece]]:
    """The pieces of every model-parallel position, in the order of its file."""
    a = source.architecture
    shapes = stored_shapes(a, layout.padded_vocab)
    companions: dict[str, list[str]] = {}
    for name in source.optimizer_tensors if optimizer else ():
        companions.setdefault(weight_name(name), []).append(name)
    objects = {name for name in source.objects if optimizer or not name.startswith("optimizer.")}
    objects = sorted(objects or object_names(a, range(a.layers)))
    shards = []
    for position, owned in zip(positions(layout), owned_boxes(a, layout), strict=True):
        layers = set(stage_layers(layout, position.pipeline))
        mine = [name for name in objects if position.tensor == 0 and _layer(name) in layers]
        pieces = [Piece(name) for name in mine]
        for name, box in owned:
            for stored in (name, *companions.get(name, ())):
                kept = dtype if stored == name else source.files.tensors[stored].dtype
                cut = cut_box(box, kept.itemsize, piece_bytes)
                pieces += [Piece(stored, part, kept, shapes[name]) for part in cut]
        shards.append(pieces)
    return shards


def _layer(name: str) -> int:
    """The layer an object belongs to; 0 where its name tells none."""
    match = re.search(r"/shard_(\d+)_\d+$", name)
    return int(match[1]) if match else 0
