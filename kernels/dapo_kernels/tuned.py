"""Tile sizes and warps of the row kernels, by card and row length. Never searched at run time.

ANALYTIC: chosen by counting, not by a stopwatch, until a table measured on the card replaces them. What was counted:
enough bytes in flight to cover memory latency (bandwidth × about 0.7 µs: 16 KiB a multiprocessor on sm_80, 23 KiB on
sm_90, 38 KiB on sm_100) at the occupancy that the compiled registers allow, few idle lanes in the last tile of a row,
and two to four 16-byte loads a thread and tile. Re-measure with `kernels/benchmarks`, per line of the table.
"""

from typing import NamedTuple

INTERPRETER_TILE = 1 << 18  # elements: the interpreter pays by the operation, not by the element


class Tile(NamedTuple):
    """Rows a program, lanes × vector columns a tile, warps a program."""

    rows: int
    lanes: int
    vector: int
    warps: int


# capability → [(up to this many bytes a row, 16-byte lanes a tile, warps)]
_BY_ROW_BYTES = {
    (8, 0): [(8 << 10, 256, 4), (64 << 10, 512, 4), (1 << 62, 1024, 8)],
    (9, 0): [(8 << 10, 256, 4), (64 << 10, 512, 4), (1 << 62, 1024, 8)],
    (10, 0): [(8 << 10, 256, 4), (64 << 10, 512, 4), (1 << 62, 2048, 16)],
}


def tile_for(capability: tuple[int, int], columns: int, element_bytes: int) -> Tile:
    """The tile for rows of `columns` elements on a card of that compute capability; the nearest older card's table
    where it has none of its own. Tiles are never longer than the row, rounded up to a power of two."""
    vector = max(1, 16 // element_bytes)
    older = [known for known in _BY_ROW_BYTES if known <= capability] or [min(_BY_ROW_BYTES)]
    table = _BY_ROW_BYTES[max(older)]
    lanes, warps = next((lanes, warps) for limit, lanes, warps in table if columns * element_bytes <= limit)
    needed = _power_of_two(-(-columns // vector))
    return Tile(1, max(32, min(lanes, needed)), vector, warps if needed >= 32 * warps else 1)


def interpreter_tile(rows: int, columns: int, element_bytes: int) -> Tile:
    """Large tiles of many rows for Triton's interpreter; two tiles a row or more where rows are long, so that the loop
    is exercised."""
    vector = max(1, 16 // element_bytes)
    needed = _power_of_two(-(-columns // vector))
    lanes = max(1, min(needed // 2, 2048)) if needed > 4 else needed
    return Tile(min(_power_of_two(rows), max(1, INTERPRETER_TILE // (lanes * vector))), lanes, vector, 4)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
