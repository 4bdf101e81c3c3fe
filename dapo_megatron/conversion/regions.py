"""Tensors that lie in files in one piece or many, read by box with plain positioned reads.

Reads, not memory maps: what is in memory is what was asked for, and a file that is cut short while it is read gives an
error instead of a bus error.
"""

import bisect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.resharding.layout import Box, intersect, volume, whole

SHORT_RUN_BYTES = 2048  # shorter row pieces than this are cut out of whole rows: a read costs as much as copying them
STRIP_BYTES = 4 << 20  # of whole rows read at a time


@dataclass(frozen=True, slots=True)
class Region:
    """`box` of a tensor lies row by row, without gaps, from byte `offset` of `path`."""

    box: Box
    path: Path
    offset: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of `dtype` and `shape`, and the regions that make it up; they cover it once."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    regions: tuple[Region, ...]


class TensorFiles:
    """Tensors by name, read by box; files are opened once.

    Raises:
        RequestError: regions of a tensor that overlap or leave a hole; names it.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self.tensors = tensors
        self._handles: dict[Path, int] = {}
        self._sorted: dict[str, tuple[list[Region], list[int], int]] = {}
        for name, tensor in tensors.items():
            regions = sorted(tensor.regions, key=lambda region: region.box)
            starts = [region.box[0][0] for region in regions]
            longest = max((region.box[0][1] - region.box[0][0] for region in regions), default=0)
            self._sorted[name] = (regions, starts, longest)
            _check_cover(name, tensor, regions)

    def read(self, name: str, box: Box) -> Tensor:
        """The box of tensor `name`, in memory of its own, in the stored dtype.

        Raises:
            RunError: a file that ends too early or cannot be read.
        """
        tensor = self.tensors[name]
        regions, starts, longest = self._sorted[name]
        size = tensor.dtype.itemsize
        shape = tuple(stop - start for start, stop in box)
        out = None
        first, last = box[0]
        for i in range(bisect.bisect_left(starts, first - longest + 1), bisect.bisect_left(starts, last)):
            common = intersect(regions[i].box, box)
            if common is None:
                continue
            part = self._read_part(regions[i], common, size)
            if common == box:
                out = part
                break
            if out is None:
                out = np.empty((*shape[:-1], shape[-1] * size), np.uint8)
            inside = [slice(a - f, b - f) for (a, b), (f, _) in zip(common, box, strict=True)]
            inside[-1] = slice(inside[-1].start * size, inside[-1].stop * size)
            out[tuple(inside)] = part
        if out is None:
            return torch.empty(shape, dtype=tensor.dtype)
        return torch.from_numpy(out.reshape(-1)).view(tensor.dtype).view(shape)

    def close(self) -> None:
        """Close all files."""
        for handle in self._handles.values():
            os.close(handle)
        self._handles.clear()

    def _read_part(self, region: Region, box: Box, size: int) -> np.ndarray:
        """Bytes [..., columns · size] of a box inside the region."""
        extents = [stop - start for start, stop in region.box]
        local = [(a - f, b - f) for (a, b), (f, _) in zip(box, region.box, strict=True)]
        if len(local) == 1:
            extents, local = [1, *extents], [(0, 1), *local]
        height, width = extents[-2], extents[-1] * size
        (top, bottom), (left, right) = local[-2], (local[-1][0] * size, local[-1][1] * size)
        out = np.empty((prod(b - a for a, b in local[:-2]), bottom - top, right - left), np.uint8)
        for place, lead in enumerate(product(*(range(a, b) for a, b in local[:-2]))):
            sheet = 0
            for extent, i in zip(extents[:-2], lead, strict=True):
                sheet = sheet * extent + i
            start = region.offset + (sheet * height + top) * width
            self._read_rows(region.path, start, width, left, out[place])
        return out.reshape(*(stop - start for start, stop in box[:-1]), right - left)

    def _read_rows(self, path: Path, start: int, width: int, left: int, out: np.ndarray) -> None:
        """Fill `out` with the byte columns from `left` of the rows, `width` bytes each, that begin at `start`."""
        rows, columns = out.shape
        if columns == width:
            self._fill(path, start, out)
        elif columns >= SHORT_RUN_BYTES:
            for row in range(rows):
                self._fill(path, start + row * width + left, out[row])
        else:
            step = max(1, STRIP_BYTES // width)
            for row in range(0, rows, step):
                strip = np.empty((min(step, rows - row), width), np.uint8)
                self._fill(path, start + row * width, strip)
                out[row : row + step] = strip[:, left : left + columns]

    def _fill(self, path: Path, offset: int, out: np.ndarray) -> None:
        view = memoryview(out.reshape(-1))
        try:
            if path not in self._handles:
                self._handles[path] = os.open(path, os.O_RDONLY)
            while view:
                count = os.preadv(self._handles[path], [view], offset)
                if count == 0:
                    raise RunError(f"{path} ends at byte {offset}, within a tensor: was it changed meanwhile?")
                view, offset = view[count:], offset + count
        except OSError as error:
            raise RunError(f"cannot read {path} at byte {offset}: {error.strerror}") from None


def pieces(shape: Sequence[int], itemsize: int, most_bytes: int) -> list[Box]:
    """Cut a tensor along its rows (the last dimension but one; a vector along its only one) into boxes of at most
    `most_bytes`, at least one row each; leading dimensions one at a time."""
    return list(cut_box(whole(tuple(shape)), itemsize, most_bytes))


def cut_box(box: Box, itemsize: int, most_bytes: int) -> list[Box]:
    """`pieces` of the tensor's box `box`."""
    axis = max(0, len(box) - 2)
    row = itemsize * (prod(stop - start for start, stop in box[axis + 1 :]))
    step = max(1, most_bytes // max(1, row))
    cut = []
    for lead in product(*(range(a, b) for a, b in box[:axis])):
        for start in range(box[axis][0], box[axis][1], step):
            rows = (start, min(start + step, box[axis][1]))
            cut.append((*((i, i + 1) for i in lead), rows, *box[axis + 1 :]))
    return cut


def _check_cover(name: str, tensor: StoredTensor, regions: list[Region]) -> None:
    """Regions sorted by box must be disjoint and add up to the whole."""
    bounds = whole(tensor.shape)
    for i, region in enumerate(regions):
        if len(region.box) != len(bounds) or any(not a <= p < q <= b for (p, q), (a, b) in zip(region.box, bounds)):  # noqa: B905
            raise RequestError(f"{region.path}: {name} {region.box} does not lie within its shape {tensor.shape}")
        for other in regions[i + 1 :]:
            if other.box[0][0] >= region.box[0][1]:
                break
            if intersect(region.box, other.box) is not None:
                raise RequestError(f"{name} {other.box} is stored twice: in {region.path} and in {other.path}")
    covered, expected = sum(volume(region.box) for region in regions), prod(tensor.shape)
    if covered != expected:
        raise RequestError(f"{name} has {expected} elements; the files hold {covered} of them")
