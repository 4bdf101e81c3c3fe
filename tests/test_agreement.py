"""What only rank 0 can fail at is told by all ranks alike, so that none waits and a checkpoint can be left."""

import pytest

from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed


def test_a_grader_that_fails_ends_every_rank_alike():
    assert run_ranks(2, "tests.agreement_cases:grading", {}, collective_limit_s=20) == [["no verdict", True]] * 2
