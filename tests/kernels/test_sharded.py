import pytest

from tests.ranks import run_ranks

CASES = [
    {"name": "plain", "kind": "plain", "rows": 40, "columns": 48, "vocab": 48, "seed": 1},
    {"name": "padded vocabulary", "kind": "plain", "rows": 24, "columns": 48, "vocab": 41, "seed": 2},
    # of 4 ranks the last holds padding alone; of 2 ranks the last does
    {"name": "ranks of padding alone", "kind": "plain", "rows": 12, "columns": 32, "vocab": 16, "seed": 3},
    {"name": "one column a rank", "kind": "plain", "rows": 8, "columns": 4, "vocab": 4, "seed": 4},
    {"name": "all negative", "kind": "negative", "rows": 12, "columns": 24, "vocab": 22, "seed": 5},
    {"name": "a shard of -inf", "kind": "-inf shard", "rows": 12, "columns": 24, "vocab": 24, "seed": 6},
    {"name": "no weight", "kind": "no weight", "rows": 5, "columns": 8, "vocab": 8, "seed": 7},
]


@pytest.mark.distributed
def test_a_split_vocabulary_gives_what_one_rank_gives_with_one_collective():
    report = run_ranks(4, "tests.kernels.sharded_cases:compare", {"cases": CASES})
    assert len(report) == len(CASES) * 2 * 2
    for name, found in report.items():
        assert found["gap"] <= 1e-11, (name, found)
        assert (found["forward"], found["backward"]) == (1, 0), (name, found)
        assert bool(found["moved"]) is not name.startswith("no weight"), (name, found)
