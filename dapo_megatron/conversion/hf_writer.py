"""Writes the files of a Hugging Face folder, piece by piece: safetensors with its header first."""

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dapo_megatron.config import Architecture
from dapo_megatron.conversion.regions import pieces
from dapo_megatron.files import HashedFile, write_text_atomically
from dapo_megatron.resharding.hf_files import TORCH_DTYPES, file_groups, file_name
from dapo_megatron.resharding.hf_layout import INDEX, canonical_tensors
from dapo_megatron.resharding.layout import Box


@dataclass(frozen=True)
class HFFile:
    """One file of the folder and its tensors, in order: (name, shape)."""

    name: str
    dtype: torch.dtype
    tensors: tuple[tuple[str, tuple[int, ...]], ...]

    @property
    def header(self) -> bytes:
        """Length and header, padded with blanks so that the elements begin at a multiple of 8."""
        kind = next(key for key, dtype in TORCH_DTYPES.items() if dtype is self.dtype)
        entries: dict = {"__metadata__": {"format": "pt"}}
        start = 0
        for name, shape in self.tensors:
            stop = start + _bytes(shape, self.dtype)
            entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, stop]}
            start = stop
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(_bytes(shape, self.dtype) for _, shape in self.tensors)


def plan_files(a: Architecture, dtype: torch.dtype, most_bytes: int) -> list[HFFile]:
    """The folder's files, at most `most_bytes` of elements each; a larger tensor stands alone."""
    shapes = canonical_tensors(a)
    groups = list(file_groups(shapes, dtype.itemsize, most_bytes))
    return [
        HFFile(file_name(i, len(groups)), dtype, tuple((tensor, shapes[tensor]) for tensor in group))
        for i, group in enumerate(groups)
    ]


def write_file(
    file: HashedFile,
    plan: HFFile,
    read: Callable[[str, Box], Tensor],
    piece_bytes: int,
    on_bytes: Callable[[int], None],
) -> None:
    """Write one file; at most `piece_bytes` of a tensor are in memory at a time."""
    file.write(plan.header)
    for name, box in boxes(plan, piece_bytes):
        data = read(name, box).to(plan.dtype).contiguous().view(-1).view(torch.uint8).numpy()
        file.write(data)
        on_bytes(data.nbytes)


def boxes(plan: HFFile, piece_bytes: int) -> Iterator[tuple[str, Box]]:
    """All tensors of a file in pieces, in the order of the file."""
    for name, shape in plan.tensors:
        for box in pieces(shape, plan.dtype.itemsize, piece_bytes):
            yield name, box


def write_index(folder: Path, files: Sequence[HFFile]) -> None:
    """Write the index of a folder with several files."""
    if len(files) > 1:
        total = sum(_bytes(shape, file.dtype) for file in files for _, shape in file.tensors)
        weight_map = {name: file.name for file in files for name, _ in file.tensors}
        write_text_atomically(folder / INDEX, json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))


def _bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    size = dtype.itemsize
    for extent in shape:
        size *= extent
    return size
