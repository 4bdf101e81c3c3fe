"""Tensors in pieces of files: every box reads back, and what does not fit is told before anything is read."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.conversion import regions
from dapo_megatron.conversion.regions import Region, StoredTensor, TensorFiles, cut_box, pieces
from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.resharding.layout import intersect, volume, whole

DTYPES = [torch.bfloat16, torch.float32, torch.float64]


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


@st.composite
def scattered(draw):
    """A tensor, and a grid of boxes that make it up."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    cuts = []
    for extent in shape:
        inner = draw(st.sets(st.integers(1, extent - 1))) if extent > 1 else set()
        borders = [0, *sorted(inner), extent]
        cuts.append(list(itertools.pairwise(borders)))
    boxes = draw(st.permutations(list(itertools.product(*cuts))))
    dtype = draw(st.sampled_from(DTYPES))
    size = volume(whole(shape)) * dtype.itemsize
    raw = torch.tensor(draw(st.lists(st.integers(0, 255), min_size=size, max_size=size)), dtype=torch.uint8)
    return raw.view(dtype).view(shape), boxes


def lay_out(folder, tensor, boxes):
    """Write the boxes into two files with gaps of odd sizes between them."""
    paths = [folder / "a.bin", folder / "b.bin"]
    contents = [bytearray(b"x" * 3), bytearray()]
    placed = []
    for i, box in enumerate(boxes):
        content = contents[i % 2]
        placed.append(Region(box, paths[i % 2], len(content)))
        content += bytes(bits(tensor[tuple(slice(a, b) for a, b in box)]).tolist()) + b"gap"
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return StoredTensor(tensor.dtype, tuple(tensor.shape), tuple(placed))


@settings(deadline=None, max_examples=150)
@given(st.data(), scattered(), st.sampled_from([0, 5, 1 << 20]))
def test_every_box_reads_back(tmp_path_factory, data, case, short_run):
    tensor, boxes = case
    folder = tmp_path_factory.mktemp("regions")
    box = []
    for extent in tensor.shape:
        start = data.draw(st.integers(0, extent - 1))
        box.append((start, data.draw(st.integers(start + 1, extent))))
    files = TensorFiles({"t": lay_out(folder, tensor, boxes)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "SHORT_RUN_BYTES", short_run)  # rows one by one, or cut out of whole ones
        patch.setattr(regions, "STRIP_BYTES", 16)
        found = files.read("t", tuple(box))
    files.close()
    assert found.dtype is tensor.dtype
    assert torch.equal(bits(found), bits(tensor[tuple(slice(a, b) for a, b in box)]))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=3), st.integers(1, 100))
def test_pieces_cover_once_and_are_small(shape, most):
    found = pieces(shape, 2, most)
    assert sum(map(volume, found)) == volume(whole(tuple(shape)))
    assert not any(intersect(a, b) for a, b in itertools.combinations(found, 2))
    row = 2 * (shape[-1] if len(shape) > 1 else 1)
    assert all(2 * volume(box) <= max(most, row) for box in found)


def test_cutting_a_box_keeps_its_columns():
    box = ((2, 3), (4, 8), (10, 16))
    assert cut_box(box, 2, 24) == [((2, 3), (4, 6), (10, 16)), ((2, 3), (6, 8), (10, 16))]


@pytest.mark.parametrize(
    ("boxes", "says"),
    [
        ([((0, 2), (0, 3))], "holds 6|hold 6"),
        ([((0, 4), (0, 2)), ((0, 4), (1, 3))], "twice"),
        ([((0, 4), (0, 3)), ((4, 5), (0, 3))], "does not lie within"),
        ([((0, 2), (0, 3)), ((1, 3), (0, 3))], "twice"),
    ],
)
def test_holes_overlaps_and_strays_are_refused(tmp_path, boxes, says):
    stored = StoredTensor(torch.float32, (4, 3), tuple(Region(box, tmp_path / "f", 0) for box in boxes))
    with pytest.raises(RequestError, match=says):
        TensorFiles({"the_tensor": stored})


def test_a_file_that_ends_early(tmp_path):
    tensor = torch.arange(40.0).view(10, 4)
    stored = lay_out(tmp_path, tensor, [whole((10, 4))])
    files = TensorFiles({"t": stored})
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:100])
    assert torch.equal(files.read("t", ((0, 2), (0, 4))), tensor[:2])
    with pytest.raises(RunError, match=r"a\.bin ends at byte"):
        files.read("t", ((5, 9), (0, 4)))
