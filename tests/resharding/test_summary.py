import pytest

from dapo_megatron.resharding.layout import Placement, WeightLayout
from dapo_megatron.resharding.messages import messages_of
from dapo_megatron.resharding.minimum import minimum_elements
from dapo_megatron.resharding.plan import Plan, make_plan
from dapo_megatron.resharding.summary import summarise

SHAPES = {"large": (64, 4), "small": (6,), "columns": (8, 6)}


def placed(**boxes: tuple) -> tuple[Placement, ...]:
    """Each box lies at the origin of a local tensor of the same name."""
    return tuple(Placement(name, box, name, (0,) * len(box)) for name, box in boxes.items())


def layouts() -> tuple[WeightLayout, WeightLayout]:
    """Rank 0 holds all, rank 1 what it will want but for `columns`; ranks 1 and 2 want everything, of columns half."""
    all_of = {name: tuple((0, size) for size in shape) for name, shape in SHAPES.items()}
    half = {**all_of, "columns": ((0, 8), (0, 3))}
    source = {0: placed(**all_of), 1: placed(large=all_of["large"], small=all_of["small"])}
    return WeightLayout(SHAPES, source), WeightLayout(SHAPES, {1: placed(**half), 2: placed(**half)})


def test_the_numbers_of_a_plan():
    source, target = layouts()
    plan = make_plan(source, target)
    messages = messages_of(plan, itemsize=2, bucket_bytes=400, coalesce_below=100)
    fewest = minimum_elements(source, target)
    assert fewest == {1: 24, 2: 256 + 6 + 24}
    found = summarise(
        plan, messages, source_ranks=[0, 1], destination_ranks=[1, 2], minimum_elements=sum(fewest.values()), itemsize=2
    )
    assert found.bytes_total == found.bytes_minimum == 2 * (24 + 286) and found.ratio == 1
    assert found.bytes_copied == 2 * 262
    assert found.destination_ranks == (1, 2) and found.bytes_per_destination_rank == (48, 572)
    assert (found.received.least, found.received.mean, found.received.most) == (48, 310, 572)
    assert found.sent.least + found.sent.most == 620
    assert found.packed_bytes == 2 * 48  # half of the columns, twice
    assert found.coalesced_bytes == 2 * 6
    assert found.direct_messages == 1 and found.messages == len(messages)
    assert found.busiest_link_bytes == max(572, found.sent.most)
    assert found.seconds_at(8e-9 * 572) == pytest.approx(found.busiest_link_bytes / 572)


def test_a_ratio_where_nothing_must_travel():
    numbers = {"source_ranks": [0], "destination_ranks": [0], "itemsize": 2}
    assert summarise(Plan(()), (), minimum_elements=0, **numbers).ratio == 1
    source, target = layouts()
    plan = make_plan(source, target)
    messages = messages_of(plan, itemsize=2, bucket_bytes=400)
    numbers = {"source_ranks": [0, 1], "destination_ranks": [1, 2], "itemsize": 2}
    assert summarise(plan, messages, minimum_elements=155, **numbers).ratio == 2
    assert summarise(plan, messages, minimum_elements=0, **numbers).ratio == float("inf")


@pytest.mark.parametrize(
    ("held", "missing"),
    [
        ((), 48),
        ((((0, 8), (0, 6)),), 0),
        ((((2, 4), (1, 3)),), 44),  # a hole in the middle
        ((((2, 4), (1, 3)), ((0, 8), (0, 1))), 36),
        ((((0, 4), (0, 6)), ((2, 8), (0, 3))), 12),  # slices that overlap count once
        ((((0, 4), (0, 6)), ((0, 4), (0, 6))), 24),
    ],
)
def test_what_a_process_holds_already_need_not_travel(held, missing):
    source = WeightLayout(SHAPES, {5: tuple(Placement("columns", box, f"k{i}", (0, 0)) for i, box in enumerate(held))})
    target = WeightLayout(SHAPES, {5: placed(columns=((0, 8), (0, 6))), 6: placed(columns=((0, 0), (0, 6)))})
    assert minimum_elements(source, target) == {5: missing, 6: 0}
