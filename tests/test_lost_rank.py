"""A rank that goes away is told as such, not by a traceback."""

import pytest
from torch.distributed import DistBackendError

from dapo_megatron.worker import lost_rank
from tests.ranks import run_ranks


@pytest.mark.distributed
def test_the_error_of_a_collective_without_its_ranks_is_understood():
    found = run_ranks(2, "tests.lost_rank_cases:left_alone", {})
    assert found.get("understood"), found["told"]
    assert not lost_rank(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_errors_of_nccl_are_told_apart():
    gone = (
        "NCCL error: remote process exited or there was a network error\nLast error: Connection closed by remote peer"
    )
    own = "NCCL error: unhandled cuda error\nLast error: Cuda failure 2 'out of memory'"
    assert lost_rank(DistBackendError(gone))
    for told in (own, "invalid usage: Duplicate GPU detected : rank 0 and rank 1 both on CUDA device 1000"):
        assert not lost_rank(DistBackendError(told))
