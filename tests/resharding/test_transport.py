from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.resharding.hf_layout import whole_layout
from dapo_megatron.resharding.megatron_layout import megatron_layout
from dapo_megatron.resharding.plan import make_plan
from dapo_megatron.resharding.transport import _cut
from tests.ranks import run_ranks
from tests.resharding.worlds import architectures, layouts


@dataclass
class Case:
    """(tensor, pipeline, virtual, data) on the source side; the same or "whole" on the target side."""

    source: tuple[int, int, int, int]
    target: tuple[int, int, int, int] | str
    bucket_bytes: int = 1 << 20
    window: int = 256
    dtype: str = "float32"
    family: str = "qwen2"
    tied: bool = False


CASES = {
    2: [
        Case((2, 1, 1, 1), "whole"),
        Case((2, 1, 1, 1), "whole", bucket_bytes=1, window=1),
        Case((1, 2, 2, 1), "whole", bucket_bytes=100, window=2, family="qwen3", tied=True),
        Case((1, 1, 1, 2), "whole"),
    ],
    4: [
        Case((4, 1, 1, 1), "whole"),
        Case((4, 1, 1, 1), "whole", bucket_bytes=1, window=1, family="llama"),
        Case((2, 2, 2, 1), "whole", bucket_bytes=64, window=3, tied=True),
        Case((2, 2, 2, 1), (4, 1, 1, 1), bucket_bytes=200, window=5),
        Case((1, 4, 1, 1), (2, 1, 1, 2), dtype="float64"),
        Case((2, 1, 1, 2), "whole"),
    ],
}


@pytest.mark.distributed
@pytest.mark.parametrize("world", CASES)
def test_every_element_arrives_and_no_byte_too_many_travels(world):
    cases = CASES[world]
    reports = run_ranks(world, "tests.resharding.transport_cases:move", {"cases": [vars(c) for c in cases]})
    assert len(reports) == len(cases)
    for case, found in zip(cases, reports, strict=True):
        assert found["wrong"] == 0, (case, found)
        assert found["sent"] == found["planned"], (case, found)
        assert found["sent"] + found["copied"] == found["all"], (case, found)
        replicated = case.source == (1, 1, 1, world)
        assert (found["messages"] == 0) == (found["sent"] == 0) == replicated, (case, found)
        if not replicated and case.bucket_bytes > 1000 and case.target == "whole" and case.source[0] == world:
            assert found["messages"] == world * (world - 1), (case, found)  # one message a pair
        if case.bucket_bytes == 1:
            assert found["messages"] > 4 * world, (case, found)


@pytest.mark.distributed
def test_a_silent_peer_is_named_when_its_time_is_up():
    # far below the time limit of the group itself, which must not be the one that fires
    told = run_ranks(2, "tests.resharding.transport_cases:silence", {"time_limit_s": 2}, time_limit_s=60)
    assert "rank 0 waited 2 s for rank 1 to send" in told[0]
    assert "rank 0 waited 2 s for rank 1 to receive" in told[1]


@given(architectures().flatmap(lambda a: st.tuples(st.just(a), layouts(a))), st.integers(1, 500), st.integers(1, 6))
@settings(deadline=None, max_examples=60)
def test_windows_are_bounded_and_keep_the_plans_order(model, most_elements, most_pairs):
    a, layout = model
    plan = make_plan(megatron_layout(a, layout), whole_layout(a, range(min(layout.world, 3))))
    windows = list(_cut(plan, most_elements, most_pairs))
    between = [m for m in plan.moves if m.source_rank != m.target_rank]
    assert [m for window in windows for m in window] == between

    def loads(window):
        found: dict[tuple[int, int], list[int]] = {}
        for m in window:
            found.setdefault((m.source_rank, m.target_rank), []).append(m.elements)
        return found

    for window in windows:
        by_pair = loads(window)
        assert window and len(by_pair) <= most_pairs
        assert all(sum(sizes) <= most_elements or len(sizes) == 1 for sizes in by_pair.values())
    for window, after in pairwise(windows):
        grown = loads([*window, after[0]])
        fits = all(sum(sizes) <= most_elements for sizes in grown.values()) and len(grown) <= most_pairs
        assert not fits  # a window ends only when the next move does not fit
