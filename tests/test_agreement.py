"""What only rank 0 can fail at is told by all ranks alike, so that none waits and a checkpoint can be left."""

import pytest

from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def test_a_grader_that_fails_or_cannot_write_ends_every_rank_alike():
    found = run_ranks(2, "tests.agreement_cases:grading_and_saving", {}, collective_limit_s=20)
    assert found["grading"] == [["no verdict", True]] * 2
    assert found["saving"] == [["a full disk\nthe state after step 7 is saved; continue with --resume", True]] * 2
    assert found["calls"] == [["save", "wait"]] * 2, "the checkpoint comes first"
