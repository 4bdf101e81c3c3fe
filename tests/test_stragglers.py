"""The rank that the others wait for is named, though all of them take equally long."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.monitoring.report_page import render_page
from dapo_megatron.monitoring.run_record import RunRecord
from dapo_megatron.monitoring.step_text import pace
from dapo_megatron.phases import OWN, WAITING
from dapo_megatron.stragglers import compare
from tests.ranks import run_ranks


def of_ranks(*seconds: float, waiting: float = 0.0) -> list[dict[str, float]]:
    return [dict.fromkeys(OWN, 0.0) | {"optimizer": value, WAITING: waiting} for value in seconds]


@pytest.mark.distributed
def test_a_slow_rank_is_named_with_its_host_and_told_after_three_comparisons():
    told = run_ranks(4, "tests.straggler_cases:compared", {})
    assert len(told["reports"]) == 3 and told["restored"]
    for report in told["reports"]:
        for name in ("forward_backward", "work"):
            found = {key.rsplit("/", 1)[1]: value for key, value in report.items() if f"/{name}/" in key}
            assert found == {"median": 2.0, "max": 16.0, "ratio": 4.0, "slowest": 2.0, "host": "n2"}
        assert report["time/ranks/waiting/max"] == 14.0 and "time/ranks/waiting/slowest" not in report
        assert not any("optimizer" in key for key in report)
    (alert,) = told["alerts"]
    assert alert.startswith("straggler: rank 2 on n2 takes 4.00 times as long as its like for its own work, 3 compar")
    assert 'slurm.options=["--exclude=n2"]' in alert


@given(st.lists(st.tuples(st.floats(0.001, 1e3), st.integers(0, 3)), min_size=2, max_size=24))
def test_the_slowest_is_the_one_furthest_above_the_middle_of_its_stage(ranks):
    seconds, stages = zip(*ranks, strict=True)
    found = compare(of_ranks(*seconds), [f"n{i}" for i in range(len(ranks))], stages)
    like = {stage: sorted(s for s, other in ranks if other == stage) for stage in set(stages)}
    ratios = [s / like[stage][(len(like[stage]) - 1) // 2] for s, stage in ranks]
    slowest = int(found["time/ranks/work/slowest"])
    assert found["time/ranks/work/ratio"] == pytest.approx(max(ratios)) == pytest.approx(ratios[slowest])
    assert found["time/ranks/work/host"] == f"n{slowest}" and found["time/ranks/optimizer/max"] == max(seconds)


def test_console_and_report_show_the_comparison():
    row = {"step": 10, "time/step": 3.0} | compare(of_ranks(1.0, 1.0, 2.5, waiting=1.5), ["a", "b", "c<"], [0, 0, 0])
    assert ("slowest", "rank 2 ×2.50") in pace(row)
    page = render_page([RunRecord("run", "", [{"step": 9}, row, {"step": 11}], [], [])], b"")
    assert "<h2>Ranks</h2>" in page
    assert "median 1 s, most 2.5 s; rank 2 on c&lt;, 2.50 times its like" in page
    assert "<h2>Ranks</h2>" not in render_page([RunRecord("run", "", [{"step": 9}], [], [])], b"")
