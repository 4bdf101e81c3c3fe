import pytest

from tests.kernels.test_sharded import CASES
from tests.ranks import run_ranks

pytest.importorskip("triton")


@pytest.mark.distributed
def test_a_split_vocabulary_gives_what_one_rank_gives_with_one_collective(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    report = run_ranks(4, "tests.kernels.sharded_triton_cases:compare", {"cases": CASES}, fresh=True)
    assert len(report) == 2 * len(CASES)
    for name, found in report.items():
        assert found["gap"] <= (2e-4 if name.startswith("all negative") else 2e-5), (name, found)  # |z/T| of 250
        assert (found["forward"], found["backward"]) == (1, 0), (name, found)
        assert found["launched"] == 6, (name, found)


@pytest.mark.distributed
def test_the_linear_ops_with_a_split_vocabulary_and_a_split_sequence(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    report = run_ranks(4, "tests.kernels.sharded_triton_cases:linear", {}, fresh=True)
    assert len(report) == 12
    for name, found in report.items():
        assert found["gap"] <= (1e-11 if name.startswith("torch") else 2e-5), (name, found)
        # one gather a chunk, one reduction of dX, one gather of the sequence; none in the backward pass
        assert (found["surplus"], found["backward"]) == (0, 0), (name, found)
