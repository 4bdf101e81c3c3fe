"""The files of a Megatron checkpoint (torch's distributed checkpoint format): where every piece of a tensor lies.

`.metadata` is pickle. It is read by an unpickler that knows the handful of record types such a file holds and refuses
everything else, after the manifest has been compared. A piece is a torch.save archive, stored without compression: the
place of its data is looked up, and its pickle is given only to torch's own weights-only loader, data skipped.
"""

import io
import pickle
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from dapo_megatron.conversion.regions import Region, StoredTensor
from dapo_megatron.errors import RequestError
from dapo_megatron.resharding.hf_files import TORCH_DTYPES
from dapo_megatron.resharding.layout import volume

METADATA = ".metadata"
DTYPE_NAMES = {str(dtype).removeprefix("torch."): dtype for dtype in TORCH_DTYPES.values()}
_CHECKPOINT = "torch.distributed.checkpoint."
RECORDS = {
    (_CHECKPOINT + "metadata", name)
    for name in (
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )
} | {
    (_CHECKPOINT + "planner", name) for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")
} | {
    (_CHECKPOINT + "filesystem", "_StorageInfo"), ("torch", "Size"), ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"), ("pathlib", "Path"),
}  # fmt: skip
UNREADABLE = (struct.error, zipfile.BadZipFile, pickle.PickleError)


@dataclass(frozen=True, slots=True)
class ObjectPlace:
    """Where an object lies, as bytes."""

    path: Path
    offset: int
    bytes: int


def read_shards(folder: Path) -> tuple[dict[str, StoredTensor], dict[str, ObjectPlace]]:
    """(tensors, objects) by stored name; reads metadata and archive directories, no weights.

    Raises:
        RequestError: metadata that cannot be read or names anything unexpected; a damaged or missing file.
    """
    metadata = read_metadata(folder / METADATA)
    places = {(index.fqn, _offset(index.offset)): info for index, info in metadata.storage_data.items()}
    handles: dict[Path, BinaryIO] = {}
    tensors, objects = {}, {}
    try:
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                place = _place(folder, name, None, places)
                objects[name] = ObjectPlace(place.path, place.offset, place.bytes)
                continue
            dtype, shape = entry.properties.dtype, tuple(entry.size)
            if dtype not in DTYPE_NAMES.values():
                raise RequestError(f"{folder}: {name} is of dtype {dtype}; one of {', '.join(DTYPE_NAMES)} is expected")
            regions = []
            for chunk in entry.chunks:
                box = tuple((o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
                place = _place(folder, name, _offset(chunk.offsets), places)
                if place.path not in handles:
                    handles[place.path] = open(place.path, "rb")  # noqa: SIM115
                regions.append(Region(box, place.path, _data_start(handles[place.path], place, name, dtype, box)))
            tensors[name] = StoredTensor(dtype, shape, tuple(regions))
    except FileNotFoundError as error:
        raise RequestError(f"{folder} lacks {Path(error.filename).name}, which its metadata names") from None
    finally:
        for handle in handles.values():
            handle.close()
    return tensors, objects


def read_metadata(path: Path) -> Metadata:
    """The `.metadata` of a checkpoint, without running anything it might hold.

    Raises:
        RequestError: not such a file, or one that names other types than checkpoint records.
    """
    try:
        with open(path, "rb") as handle:
            metadata = _RecordsOnly(handle).load()
        if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
            raise TypeError(f"{type(metadata).__name__} where Metadata is expected")
    except RequestError:
        raise
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # a damaged pickle can fail in any way
        raise RequestError(f"{path} is not checkpoint metadata: {type(error).__name__}: {error}") from None
    return metadata


class _RecordsOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found
        if (module, name) in RECORDS:
            return super().find_class(module, name)
        raise RequestError(f"checkpoint metadata names {module}.{name}, which is no checkpoint record: refused")


class _Window(io.RawIOBase):
    """`length` bytes of an open file from `start`, as a file of their own."""

    def __init__(self, handle: BinaryIO, start: int, length: int) -> None:
        self.handle, self.start, self.length, self.place = handle, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.length}[whence]
        return self.place

    def tell(self) -> int:
        return self.place

    def readinto(self, buffer: Any) -> int:
        self.handle.seek(self.start + self.place)
        part = self.handle.read(max(0, min(len(buffer), self.length - self.place)))
        buffer[: len(part)] = part
        self.place += len(part)
        return len(part)


def _offset(offset: torch.Size | None) -> tuple[int, ...] | None:
    return None if offset is None else tuple(offset)


def _place(folder: Path, name: str, offset: tuple[int, ...] | None, places: dict) -> ObjectPlace:
    info = places.get((name, offset))
    if info is None:
        raise RequestError(f"{folder / METADATA} does not say where {name} {offset or ''} lies")
    path = Path(str(info.relative_path))
    if path.is_absolute() or ".." in path.parts or info.transform_descriptors:
        raise RequestError(f"{folder / METADATA}: {name} lies in {path}, which is not a plain file of the folder")
    return ObjectPlace(folder / path, int(info.offset), int(info.length))


def _data_start(handle: BinaryIO, place: ObjectPlace, name: str, dtype: torch.dtype, box: tuple) -> int:
    """The byte of the file at which the piece's elements begin, row by row."""
    window = _Window(handle, place.offset, place.bytes)
    wanted = [stop - start for start, stop in box]
    try:
        with zipfile.ZipFile(window) as archive:
            (entry,) = [info for info in archive.infolist() if info.filename.endswith("/data/0")]
            order = archive.read(entry.filename.removesuffix("data/0") + "byteorder")
        if order != b"little" or entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError("it is compressed or big-endian")
        window.seek(entry.header_offset)
        header = window.read(30)
        start = entry.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        window.seek(0)
        with torch.serialization.skip_data():
            tensor = torch.load(window, map_location="cpu", weights_only=True)
        if [*tensor.shape] != wanted or tensor.dtype is not dtype or entry.file_size != volume(box) * dtype.itemsize:
            raise ValueError(f"it holds {tensor.dtype} {tuple(tensor.shape)} in {entry.file_size} bytes")
        if not tensor.is_contiguous() or tensor.storage_offset():
            raise ValueError("its elements are not in order")
    except (
        ValueError,
        KeyError,
        RuntimeError,
        EOFError,
        struct.error,
        zipfile.BadZipFile,
        pickle.PickleError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RequestError(f"{place.path}: {name} {box} cannot be read: {reason}") from None
    return place.offset + start
