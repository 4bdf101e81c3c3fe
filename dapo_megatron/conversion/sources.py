"""A checkpoint of either form, read by box under canonical names or under those of Megatron's stored tensors."""

import json
import struct
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from dapo_megatron.config import Architecture, read_architecture
from dapo_megatron.config.architecture import critic_of
from dapo_megatron.conversion.names import VOCABULARY, Link, links_of, project, stored_shapes
from dapo_megatron.conversion.regions import Region, StoredTensor, TensorFiles
from dapo_megatron.conversion.shard_reader import ObjectPlace, read_shards
from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.learner.manifest import CRITIC, POLICY
from dapo_megatron.resharding.hf_files import TORCH_DTYPES
from dapo_megatron.resharding.hf_layout import canonical_tensors, check_checkpoint, read_headers
from dapo_megatron.resharding.layout import Box, intersect, volume, whole

OPTIMIZER = "optimizer.state."  # then a kind (exp_avg, …), then the name of the weight


class Source:
    """The tensors of a model in files, under both kinds of names.

    Args:
        files: the tensors, under stored names where `megatron`, else under canonical ones.
        side_files: the folder of config.json and tokenizer.
        objects: what a Megatron checkpoint holds beside tensors, by name.
    """

    def __init__(
        self,
        architecture: Architecture,
        files: TensorFiles,
        *,
        megatron: bool,
        side_files: Path,
        objects: dict[str, ObjectPlace] | None = None,
    ) -> None:
        self.architecture, self.files, self.megatron, self.side_files = architecture, files, megatron, side_files
        self.objects = objects or {}
        self._links_of: dict[str, list[Link]] = defaultdict(list)
        for link in links_of(architecture):
            self._links_of[link.name].append(link)
            self._links_of[link.stored].append(link)

    @property
    def optimizer_tensors(self) -> list[str]:
        """Stored names of optimizer state."""
        return [name for name in self.files.tensors if name.startswith(OPTIMIZER)]

    @property
    def weights(self) -> dict[str, StoredTensor]:
        """Tensors by the name they have in the files, optimizer state aside."""
        return {name: tensor for name, tensor in self.files.tensors.items() if not name.startswith(OPTIMIZER)}

    @property
    def dtypes(self) -> list[torch.dtype]:
        """Dtypes of the weights."""
        return sorted({tensor.dtype for tensor in self.weights.values()}, key=str)

    def canonical(self, name: str, box: Box) -> Tensor:
        """A box of the canonical tensor `name`."""
        if not self.megatron:
            return self.files.read(name, box)
        links = [(link.box, link.stored, link.stored_box) for link in self._links_of[name]]
        return self._gather(name, box, links, padded=False)

    def stored(self, name: str, box: Box) -> Tensor:
        """A box of Megatron's stored tensor `name`; vocabulary rows that no token has are 0."""
        padded = weight_name(name) in VOCABULARY
        if not self.megatron:
            links = [(link.stored_box, link.name, link.box) for link in self._links_of[name]]
        elif padded:  # the two sides may pad differently
            real = ((0, self.architecture.vocab), (0, self.architecture.hidden))
            links = [(real, name, real)]
        else:
            return self.files.read(name, box)
        return self._gather(name, box, links, padded=padded)

    def object_bytes(self, name: str) -> bytes:
        """The object `name` as it is stored."""
        place = self.objects[name]
        with open(place.path, "rb") as handle:
            handle.seek(place.offset)
            return handle.read(place.bytes)

    def _gather(self, name: str, box: Box, links: list[tuple[Box, str, Box]], *, padded: bool) -> Tensor:
        """Assemble `box` from links (box here, name in the files, box there)."""
        shape = [stop - start for start, stop in box]
        out = None
        covered = 0
        for here, there, there_box in links:
            common = intersect(here, box)
            if common is None:
                continue
            part = self.files.read(there, project(common, here, there_box))
            part = part.view([stop - start for start, stop in common])
            if common == box:
                return part
            if out is None:
                out = torch.zeros(shape, dtype=part.dtype) if padded else torch.empty(shape, dtype=part.dtype)
            out[tuple(slice(a - f, b - f) for (a, b), (f, _) in zip(common, box, strict=True))] = part
            covered += volume(common)
        if out is None and padded:
            return torch.zeros(shape, dtype=self.files.tensors[links[0][1]].dtype)
        if out is None or (covered != volume(box) and not padded):
            raise RunError(f"{name} {box}: {covered} of its {volume(box)} elements have a source")
        return out


def weight_name(stored: str) -> str:
    """The weight that a stored tensor is or, for optimizer state, belongs to."""
    return stored.removeprefix(OPTIMIZER).partition(".")[2] if stored.startswith(OPTIMIZER) else stored


def open_hugging_face(folder: Path, *, critic: bool = False) -> Source:
    """A Hugging Face folder, of a critic if told so; only headers are read.

    Raises:
        RequestError: a folder that does not hold the tensors its config.json asks for; a header whose offsets do not
            fit its shapes.
    """
    architecture = read_architecture(folder)
    architecture = critic_of(architecture) if critic else architecture
    check_checkpoint(folder, architecture)
    headers = read_headers(folder)
    offsets = {path: _data_offsets(path) for path in {path for path, _, _ in headers.values()}}
    tensors = {}
    for name in canonical_tensors(architecture):
        path, dtype, shape = headers[name]
        if dtype not in TORCH_DTYPES:
            raise RequestError(f"{path}: {name} is of dtype {dtype}; one of {', '.join(TORCH_DTYPES)} is expected")
        start, stop = offsets[path][name]
        expected = volume(whole(shape)) * TORCH_DTYPES[dtype].itemsize
        if start < 0 or stop - start != expected:
            raise RequestError(f"{path}: {name} has {stop - start} bytes where {dtype} {shape} takes {expected}")
        tensors[name] = StoredTensor(TORCH_DTYPES[dtype], shape, (Region(whole(shape), path, start),))
    return Source(architecture, TensorFiles(tensors), megatron=False, side_files=folder)


def open_megatron(folder: Path, part: str = POLICY) -> Source:
    """A checkpoint folder whose manifest has been checked; only metadata is read. `part`: POLICY or CRITIC.

    Raises:
        RequestError: no critic where one is asked for; a weight that is missing or of another shape, a tensor that does
            not belong.
    """
    if part == CRITIC and not (folder / part).is_dir():
        raise RequestError(f"{folder} holds no critic: its run had none, or it was converted, which leaves one behind")
    side_files = folder / "hf"
    if (folder / part / "hf").is_dir():  # of a critic that began from a folder of its own
        side_files = folder / part / "hf"
    architecture = read_architecture(side_files)
    architecture = critic_of(architecture) if part == CRITIC else architecture
    tensors, objects = read_shards(folder / part)
    embedding = tensors.get(VOCABULARY[0])
    rows = embedding.shape[0] if embedding is not None and embedding.shape else architecture.vocab
    expected = stored_shapes(architecture, max(rows, architecture.vocab))
    if missing := [name for name in expected if name not in tensors]:
        raise RequestError(f"{folder} lacks {missing[0]}")
    for name, tensor in tensors.items():
        shape = expected.get(weight_name(name))
        if shape is None:
            raise RequestError(f"{folder} holds {name}, unknown to this {architecture.family} architecture")
        if tensor.shape != shape:
            raise RequestError(f"{folder}: {name} has shape {tensor.shape}; config.json asks for {shape}")
    return Source(architecture, TensorFiles(tensors), megatron=True, side_files=side_files, objects=objects)


def _data_offsets(path: Path) -> dict[str, tuple[int, int]]:
    """Tensor name → (first, last + 1) byte in the file; the header has been found sound by `read_headers`."""
    with open(path, "rb") as handle:
        length = struct.unpack("<Q", handle.read(8))[0]
        entries = json.loads(handle.read(length))
    entries.pop("__metadata__", None)
    try:
        found = {name: tuple(8 + length + int(n) for n in entry["data_offsets"]) for name, entry in entries.items()}
        ordered = sorted((start, stop, name) for name, (start, stop) in found.items())
    except (ValueError, TypeError, LookupError):
        raise RequestError(f"{path} has a damaged safetensors header") from None
    for (_, stop, name), (start, _, other) in pairwise(ordered):
        if start < stop:
            raise RequestError(f"{path} has a damaged safetensors header: {name} and {other} overlap")
    return found
