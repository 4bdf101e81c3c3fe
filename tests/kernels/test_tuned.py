"""The committed tile sizes: every card and shape has one, and it does not depend on the number of rows."""

import inspect

import pytest
from dapo_kernels.tuned import tile_for
from hypothesis import given
from hypothesis import strategies as st

CARDS = [(8, 0), (9, 0), (10, 0)]
SHAPES = (32000, 152064, 19008, 38016)


@given(
    capability=st.sampled_from([*CARDS, (7, 5), (8, 9), (9, 4), (12, 0)]),
    columns=st.integers(1, 1 << 20),
    element_bytes=st.sampled_from([2, 4]),
    read_twice=st.booleans(),
    warp=st.sampled_from([32, 64]),
)
def test_a_tile_can_be_launched(capability, columns, element_bytes, read_twice, warp):
    tile = tile_for(capability, columns, element_bytes, read_twice=read_twice, warp=warp)
    assert tile.vector * element_bytes == 16, "a lane loads 16 bytes"
    for size in tile:
        assert size > 0 and size & (size - 1) == 0
    assert tile.lanes == warp * tile.warps, "a lane is a thread: what it holds is reduced within it"
    assert tile.warps <= 32
    elements = tile.vectors * tile.lanes * tile.vector
    assert elements < max(2 * warp * tile.vector, 2 * columns + tile.vector), "no tile of idle lanes"


@pytest.mark.parametrize("columns", SHAPES)
@pytest.mark.parametrize("capability", CARDS)
def test_the_benchmarked_shapes_keep_enough_bytes_in_flight(capability, columns):
    """Two to four 16-byte loads a thread and tile, as the table's header counts."""
    tile = tile_for(capability, columns, 2)
    assert 2 <= tile.vectors <= 4


def test_long_rows_that_are_read_twice_are_alone_on_their_multiprocessor():
    """More of them than multiprocessors, each of 304 kB, would drive one another out of the cache."""
    assert tile_for((9, 0), 152064, 2, read_twice=True).warps == 32 > tile_for((9, 0), 152064, 2).warps
    assert tile_for((9, 0), 19008, 2, read_twice=True) == tile_for((9, 0), 19008, 2)


def test_a_card_without_a_table_of_its_own_takes_that_of_the_next_older_one():
    assert tile_for((8, 9), 152064, 2) == tile_for((8, 0), 152064, 2)
    assert tile_for((12, 0), 152064, 2) == tile_for((10, 0), 152064, 2) != tile_for((9, 0), 152064, 2)
    assert tile_for((7, 5), 152064, 2) == tile_for((8, 0), 152064, 2)


def test_the_number_of_rows_is_not_asked():
    assert list(inspect.signature(tile_for).parameters) == [
        "capability", "columns", "element_bytes", "read_twice", "warp",
    ]  # fmt: skip
