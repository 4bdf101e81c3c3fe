"""A rank that goes away is told as such, not by a traceback."""

import pytest

from dapo_megatron.worker import lost_rank
from tests.ranks import run_ranks


@pytest.mark.distributed
def test_the_error_of_a_collective_without_its_ranks_is_understood():
    found = run_ranks(2, "tests.lost_rank_cases:left_alone", {})
    assert found.get("understood"), found["told"]
    assert not lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
