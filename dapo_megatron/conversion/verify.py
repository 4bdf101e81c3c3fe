"""Reads a finished destination again and compares every byte with the source, a piece at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from dapo_megatron.conversion.names import VOCABULARY
from dapo_megatron.conversion.regions import cut_box, pieces
from dapo_megatron.conversion.sources import Source, weight_name
from dapo_megatron.errors import RunError
from dapo_megatron.resharding.hf_layout import canonical_tensors
from dapo_megatron.resharding.layout import Box, whole


def verify(
    source: Source, result: Source, *, dtype: torch.dtype, piece_bytes: int, on_bytes: Callable[[int], None]
) -> int:
    """Compare all tensors of `result` with those of `source` (its weights in `dtype`); returns how many.

    Weights are compared under their canonical names, optimizer state and objects under their stored ones; rows beyond
    the vocabulary must be 0.

    Raises:
        RunError: names the first tensor and box that differ.
    """
    count = 0
    for name, shape in canonical_tensors(source.architecture).items():
        for box in pieces(shape, _widest(dtype, source, result), piece_bytes):
            found = result.canonical(name, box)
            _compare(name, box, source.canonical(name, box).to(dtype), found)
            on_bytes(found.nbytes)
        count += 1
    for name in result.optimizer_tensors:
        vocabulary = weight_name(name) in VOCABULARY
        shape = result.files.tensors[name].shape
        rows = (source.architecture.vocab, *shape[1:]) if vocabulary else shape
        for box in pieces(rows, result.files.tensors[name].dtype.itemsize, piece_bytes):
            found = result.stored(name, box)
            _compare(name, box, source.stored(name, box), found)
            on_bytes(found.nbytes)
        count += 1
    for name, tensor in result.files.tensors.items():
        if result.megatron and weight_name(name) in VOCABULARY:
            _check_padding(name, result, tensor.shape, piece_bytes)
    for name in source.objects if result.megatron else ():
        if name in result.objects and source.object_bytes(name) != result.object_bytes(name):
            raise RunError(f"verification: object {name} differs from the source's")
    return count


def _compare(name: str, box: Box, expected: Tensor, found: Tensor) -> None:
    # as bytes: a NaN must equal itself, and -0 must not equal 0
    same = expected.dtype is found.dtype and torch.equal(_raw(expected), _raw(found))
    if not same:
        raise RunError(f"verification: {name} {box} differs from the source; was the disk or the source disturbed?")


def _check_padding(name: str, result: Source, shape: tuple[int, ...], piece_bytes: int) -> None:
    rows = ((result.architecture.vocab, shape[0]), *whole(shape)[1:])
    if rows[0][0] < rows[0][1]:
        for box in cut_box(rows, result.files.tensors[name].dtype.itemsize, piece_bytes):
            if torch.any(_raw(result.files.read(name, box))):
                raise RunError(f"verification: {name} has rows beyond the vocabulary that are not 0")


def _raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _widest(dtype: torch.dtype, *sides: Source) -> int:
    return max(d.itemsize for d in (dtype, *(d for side in sides for d in side.dtypes)))
