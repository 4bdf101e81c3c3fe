"""Tile sizes and warps of the row kernels, by card and row length. Never searched at run time.

ANALYTIC: chosen by counting, not by a stopwatch, until a table measured on the card replaces them. What was counted:
enough bytes in flight to cover memory latency (bandwidth × about 0.7 µs: 16 KiB a multiprocessor on sm_80, 23 KiB on
sm_90, 38 KiB on sm_100) at the occupancy that the compiled registers allow, few idle lanes in the last tile of a row,
and two to four 16-byte loads a thread and tile. A kernel that reads its row twice wants the second reading from the L2:
the rows in flight must fit into it, so a long row gets a multiprocessor to itself (132 rows of 152,064 in bf16 are
40 MB, of which half is between its readings, beside an L2 of 50 MB). Re-measure with `kernels/benchmarks`, per line of
the table.
"""

from typing import NamedTuple

MOST_THREADS = 1024  # of a program, on any card
INTERPRETER_TILE = 1 << 18  # elements: the interpreter pays by the operation, not by the element


class Tile(NamedTuple):
    """Rows a program, 16-byte vectors a lane × lanes × elements a vector of a tile, warps a program."""

    rows: int
    vectors: int
    lanes: int
    vector: int
    warps: int


# capability → [(up to this many bytes a row, 16-byte vectors a lane and tile, warps)]
_BY_ROW_BYTES = {
    (8, 0): [(8 << 10, 2, 4), (64 << 10, 4, 4), (1 << 62, 4, 8)],
    (9, 0): [(8 << 10, 2, 4), (64 << 10, 4, 4), (1 << 62, 4, 8)],
    (10, 0): [(8 << 10, 2, 4), (64 << 10, 4, 4), (1 << 62, 4, 16)],
}
# of the kernel that reads its row twice
_READ_TWICE = {
    (8, 0): [(8 << 10, 2, 4), (24 << 10, 4, 4), (64 << 10, 4, 8), (128 << 10, 4, 16), (1 << 62, 4, 32)],
    (9, 0): [(8 << 10, 2, 4), (24 << 10, 4, 4), (64 << 10, 4, 8), (128 << 10, 4, 16), (1 << 62, 4, 32)],
    (10, 0): [(8 << 10, 2, 4), (128 << 10, 4, 8), (1 << 62, 4, 32)],
}


def tile_for(
    capability: tuple[int, int],
    columns: int,
    element_bytes: int,
    *,
    read_twice: bool = False,
    plain: bool = True,
    warp: int = 32,
) -> Tile:
    """The tile for rows of `columns` elements on a card of that compute capability, whose warps have `warp` threads,
    for a kernel that reads the row once or twice; by the nearest older card's table where it has none. A lane is
    a thread. Tiles are never longer than the row, rounded up to a power of two. Rows that are not `plain`, with padded
    columns or no multiple of 16 bytes, have two vectors a lane or one where they are read twice, and the latter never
    16 warps: registers run out otherwise."""
    table = _READ_TWICE if read_twice else _BY_ROW_BYTES
    lines = table[max((known for known in table if known <= capability), default=min(table))]
    vectors, warps = next((vectors, warps) for limit, vectors, warps in lines if columns * element_bytes <= limit)
    vector = max(1, 16 // element_bytes)
    needed = -(-columns // vector)
    odd = columns * element_bytes % 16 != 0
    if read_twice and odd and warps == 16:
        warps = 32
    while warps > 1 and warps * warp > min(needed, MOST_THREADS):
        warps //= 2
    lanes = warps * warp
    if read_twice and not plain:
        vectors = min(vectors, 1 if odd else 2)
    return Tile(1, min(vectors, _power_of_two(-(-needed // lanes))), lanes, vector, warps)


def interpreter_tile(rows: int, columns: int, element_bytes: int) -> Tile:
    """Large tiles of many rows for Triton's interpreter; two tiles a row or more where rows are long, so that the loop
    is exercised, and two vectors a lane."""
    vector = max(1, 16 // element_bytes)
    needed = _power_of_two(-(-columns // vector))
    whole = max(1, min(needed // 2, 2048)) if needed > 4 else needed
    vectors = min(2, whole)
    rows_a_tile = min(_power_of_two(rows), max(1, INTERPRETER_TILE // (whole * vector)))
    return Tile(rows_a_tile, vectors, whole // vectors, vector, 4)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
