"""The numbers to reach on a GPU, and whether a run reached them."""

from collections.abc import Iterator
from typing import NamedTuple

LOSS, LOGPROBS = "clipped loss + gradient", "log-probs"
LINEAR_LOSS, LINEAR_LOGPROBS = "linear loss + gradients", "linear log-probs"
MOST_TIMES_FLOOR = {LOSS: 1.15, LOGPROBS: 1.15, LINEAR_LOSS: 1.15, LINEAR_LOGPROBS: 1.10}
LEAST_SPEED_UP = {LOSS: 1.5, LINEAR_LOSS: 2.0}  # over Liger
JUDGED_ROWS, JUDGED_COLUMNS, JUDGED_WIDTH = 8192, (152064, 19008), 5120
MOST_EXTRA_MIB = 0.25 * 1024  # of the linear loss at 16,384 rows of 19,008 columns
Row = dict[str, object]


class Verdict(NamedTuple):
    """`found` against `wanted`, both as text."""

    what: str
    found: str
    wanted: str
    reached: bool


def wanted_times_floor(row: Row) -> float | None:
    """The largest ratio to the floor that this row may have; None where none is asked for."""
    judged = (
        row["implementation"] == "triton"
        and row["device"] == "cuda"
        and row["mix"] == "plain"
        and int(row["N"]) == JUDGED_ROWS
        and int(row["V"]) in JUDGED_COLUMNS
        and row["H"] in ("", JUDGED_WIDTH, str(JUDGED_WIDTH))
    )
    return MOST_TIMES_FLOOR[str(row["op"])] if judged else None


def verdicts(rows: list[Row]) -> Iterator[Verdict]:
    """Every number asked for of which the rows say something."""
    for row in rows:
        most = wanted_times_floor(row)
        shape = f"{row['op']}, N {row['N']}, V {row['V']}" + (f", H {row['H']}" if row["H"] else "")
        ours = row["implementation"] == "triton" and row["device"] == "cuda" and row["mix"] == "plain"
        if most is not None:
            ratio = float(row["times_floor"])
            yield Verdict(shape, f"{ratio:.2f} × the floor", f"at most {most:.2f}", ratio <= most)
            if row["op"] in LEAST_SPEED_UP:
                peers = [r for r in rows if str(r["implementation"]).startswith("liger") and _same_shape(r, row)]
                if peers:
                    speed_up = min(float(r["median_ms"]) for r in peers) / float(row["median_ms"])
                    least = LEAST_SPEED_UP[str(row["op"])]
                    yield Verdict(shape, f"{speed_up:.2f} × Liger's speed", f"at least {least}", speed_up >= least)
            if row["op"] == LOSS:
                extra, matrix = float(row["peak_MiB"]), int(row["N"]) * int(row["V"]) * 2 / 2**20
                yield Verdict(shape, f"{extra:.0f} MiB extra", f"less than N × V, {matrix:.0f} MiB", extra < matrix)
        if ours and row["op"] == LINEAR_LOSS and int(row["N"]) == 16384 and int(row["V"]) == 19008:
            extra = float(row["peak_MiB"])
            yield Verdict(shape, f"{extra:.0f} MiB extra", f"at most {MOST_EXTRA_MIB:.0f} MiB", extra <= MOST_EXTRA_MIB)


def _same_shape(a: Row, b: Row) -> bool:
    return all(str(a[key]) == str(b[key]) for key in ("op", "N", "V", "H", "mix"))
