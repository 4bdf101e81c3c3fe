"""One rank of a split vocabulary, alone on its card: our ops go the way that they go there, statistics of all rows and
then the rest; the gather between them is the network's time and is left out. A vocabulary that is whole is spared the
second reading of the logits: another path, which must not stand for a rank's in a table."""

from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from unittest import mock

COLUMNS_OF_A_RANK = (19008, 38016)  # 152,064 over 8 and over 4


def as_a_rank(columns: int) -> AbstractContextManager:
    """Within, the ops take `columns` for a rank's where it is one of COLUMNS_OF_A_RANK."""
    if columns not in COLUMNS_OF_A_RANK or find_spec("triton") is None:
        return nullcontext()
    from dapo_kernels import triton_rows

    return mock.patch.object(triton_rows, "WHOLE_ROWS_AT_ONCE", False)
