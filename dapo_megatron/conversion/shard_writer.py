"""Writes the files of a Megatron checkpoint, piece by piece: torch's distributed checkpoint format, one process.

Pieces, index and metadata are those of torch's own writer, which is not used for the data: it keeps the last piece of
every tensor until a file is done, so its memory would grow with the model.
"""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from dapo_megatron.files import HashedFile, atomic_path, write_text_atomically
from dapo_megatron.resharding.layout import Box

FORMAT = {
    "sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch",
    "common_backend_version": 1,
}  # fmt: skip
COMMON, FORMAT_FILE = "common.pt", "metadata.json"
OVERHEAD_BYTES = 2048  # of a piece's archive around its elements, and of its lines in the metadata
OBJECT_BYTES = 2048


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of the stored tensor `name`, which is of `dtype` and of shape `whole`; without a box, an object."""

    name: str
    box: Box | None = None
    dtype: torch.dtype | None = None
    whole: tuple[int, ...] = ()

    @property
    def bytes(self) -> int:
        """Elements' bytes; of an object, an upper bound."""
        if self.box is None:
            return OBJECT_BYTES
        size = self.dtype.itemsize
        for start, stop in self.box:
            size *= stop - start
        return size


@dataclass(frozen=True, slots=True)
class Written:
    """Where a piece lies in its file."""

    offset: int
    length: int


def shard_name(position: int) -> str:
    """The file of the `position`-th model-parallel rank."""
    return f"__{position}_0.distcp"


def empty_object() -> bytes:
    """The object that megatron saves for a linear without extra state."""
    buffer = io.BytesIO()
    torch.save([None], buffer)
    return buffer.getvalue()


def write_shard(
    file: HashedFile,
    pieces: Sequence[Piece],
    read: Callable[[str, Box], Tensor],
    read_object: Callable[[str], bytes],
    on_bytes: Callable[[int], None],
) -> list[Written]:
    """Write the pieces one after the other; one of them is in memory at a time."""
    places = []
    for piece in pieces:
        start = file.tell()
        if piece.box is None:
            file.write(read_object(piece.name))
        else:
            torch.save(read(piece.name, piece.box).to(piece.dtype), file)
        places.append(Written(start, file.tell() - start))
        on_bytes(piece.bytes)
    return places


def write_index(folder: Path, shards: Sequence[Sequence[Piece]], places: Sequence[Sequence[Written]]) -> None:
    """Write `.metadata` and metadata.json for shard files that are complete; `places` beside each piece."""
    plans, metadata = create_default_global_save_plan([SavePlan([_item(p) for p in pieces]) for pieces in shards])
    results = [
        WriteResult(item.index, at.length, _StorageInfo(shard_name(i), at.offset, at.length))
        for i, (plan, written) in enumerate(zip(plans, places, strict=True))
        for item, at in zip(plan.items, written, strict=True)
    ]
    FileSystemWriter(folder).finish(metadata, [results])
    write_text_atomically(folder / FORMAT_FILE, json.dumps(FORMAT))


def write_common(folder: Path) -> None:
    """Write common.pt as megatron does for weights alone: there is nothing in common."""
    with atomic_path(folder / COMMON) as path:
        torch.save({}, path)


def _item(piece: Piece) -> WriteItem:
    if piece.box is None:
        return WriteItem(MetadataIndex(piece.name), WriteItemType.BYTE_IO)
    offsets = torch.Size([start for start, _ in piece.box])
    sizes = torch.Size([stop - start for start, stop in piece.box])
    data = TensorWriteData(
        chunk=ChunkStorageMetadata(offsets, sizes),
        properties=TensorProperties(dtype=piece.dtype),
        size=torch.Size(piece.whole),
    )
    return WriteItem(MetadataIndex(piece.name, offsets), WriteItemType.SHARD, tensor_data=data)
