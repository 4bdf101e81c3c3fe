from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.resharding.hf_layout import whole_layout
from dapo_megatron.resharding.layout import Placement, WeightLayout
from dapo_megatron.resharding.megatron_layout import megatron_layout
from dapo_megatron.resharding.messages import MOST_DIRECT_BYTES, Message, cut, messages_of, windows_of
from dapo_megatron.resharding.minimum import minimum_elements
from dapo_megatron.resharding.plan import Plan, make_plan
from dapo_megatron.resharding.vllm_layout import vllm_layout
from tests.resharding.worlds import (
    PADDING,
    architecture,
    architectures,
    box,
    carry_out_messages,
    layout_for,
    layouts,
    numbered,
    shards,
    vllm_sizes,
    vllm_worker,
)

ITEMSIZE = 4
UNTOUCHED = -7  # what a move may not touch: the padded rows
MODELS = architectures().flatmap(
    lambda a: st.tuples(st.just(a), layouts(a), st.sampled_from(vllm_sizes(a)), st.integers(1, 2), st.booleans())
)
# from a single element to everything at once
LIMITS = {"bucket_bytes": st.sampled_from([1, 16, 100, 1000, 1 << 20]), "coalesce_below": st.sampled_from([1, 40, 300])}


def bridge(model) -> tuple[WeightLayout, WeightLayout]:
    """Learner ranks, and engines behind them or (`apart` false) in the same processes."""
    a, layout, tensor, engines, apart = model
    first_rank = layout.world if apart else 0
    return megatron_layout(a, layout), vllm_layout(a, engines=engines, tensor=tensor, first_rank=first_rank)


@given(MODELS, st.fixed_dictionaries(LIMITS))
@settings(deadline=None, max_examples=120)
def test_every_element_arrives_at_every_worker_with_the_fewest_bytes(model, limits):
    a, layout, tensor, _, _ = model
    source, target = bridge(model)
    plan = make_plan(source, target)
    messages = messages_of(plan, itemsize=ITEMSIZE, **limits)
    whole = numbered(a)
    first_rank = min(target.placements)
    expected = {rank: vllm_worker(a, whole, tensor, (rank - first_rank) % tensor) for rank in target.placements}
    held = shards(a, layout, whole)
    found = {r: {name: torch.full_like(t, UNTOUCHED) for name, t in local.items()} for r, local in expected.items()}
    carry_out_messages(plan, messages, held, found)
    fewest = 0
    for rank, local in expected.items():
        mine = torch.cat([t.flatten() for t in held[rank].values()]) if rank in held else torch.empty(0)
        for name, t in local.items():
            assert torch.equal(found[rank][name], torch.where(t == PADDING, UNTOUCHED, t)), (rank, name)
            fewest += int(((t != PADDING) & ~torch.isin(t, mine)).sum())
    assert sum(message.elements for message in messages) == fewest
    assert sum(minimum_elements(source, target).values()) == fewest


@given(MODELS, st.fixed_dictionaries(LIMITS))
@settings(deadline=None, max_examples=60)
def test_each_move_travels_in_one_message_or_in_disjoint_parts(model, limits):
    plan = make_plan(*bridge(model))
    messages = messages_of(plan, itemsize=ITEMSIZE, **limits)
    half = max(1, limits["bucket_bytes"] // 2 // ITEMSIZE)
    between = [m for m in plan.moves if m.source_rank != m.target_rank]
    seen = [m for message in messages for m in message.moves]
    assert len(seen) == len({(m.target_rank, m.target_key, m.target_offset) for m in seen})
    parts = [part for m in between for part in (cut(m, half) if m not in seen else [m])]
    assert sorted(parts, key=repr) == sorted(seen, key=repr)
    for message in messages:
        assert message.source_rank != message.target_rank
        assert message.elements == sum(m.elements for m in message.moves)
        if message.direct:
            (only,) = message.moves
            assert only.contiguous and only.elements * ITEMSIZE >= limits["coalesce_below"]
        else:
            assert message.elements <= half
            large = [m for m in message.moves if m.elements * ITEMSIZE >= limits["coalesce_below"]]
            assert not large or len(message.moves) == 1


@given(MODELS)
@settings(deadline=None, max_examples=60)
def test_contiguous_is_what_torch_calls_contiguous(model):
    a, layout, tensor, _, apart = model
    whole = numbered(a)
    held = shards(a, layout, whole)
    first_rank = layout.world if apart else 0
    for m in make_plan(*bridge(model)).moves:
        into = vllm_worker(a, whole, tensor, (m.target_rank - first_rank) % tensor)[m.target_key]
        views = (box(held[m.source_rank][m.source_key], m.source_offset, m.shape), box(into, m.target_offset, m.shape))
        assert m.contiguous == all(view.is_contiguous() for view in views), m


@given(MODELS, st.fixed_dictionaries(LIMITS), st.data())
@settings(deadline=None, max_examples=80)
def test_windows_are_bounded_and_no_rank_waits_forever(model, limits, data):
    source, target = bridge(model)
    messages = messages_of(make_plan(source, target), itemsize=ITEMSIZE, **limits)
    ranks = sorted({*source.placements, *target.placements})
    windows = {}
    for rank in ranks:
        # ranks cut their windows as they like: each may have bounds of its own
        most, bucket = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 50, 400, 1 << 20]))
        mine = windows_of(messages, rank, itemsize=ITEMSIZE, bucket_bytes=bucket, most_operations=most)
        assert [m for window in mine for m in window] == [m for m in messages if rank in (m.source_rank, m.target_rank)]
        for window in mine:
            assert 1 <= len(window) <= most
            assert _in_bucket(window) <= bucket or sum(not m.direct for m in window) == 1
        for window, after in pairwise(mine):  # and a window ends only when the next message does not fit
            assert len(window) == most or _in_bucket([*window, after[0]]) > bucket
        windows[rank] = mine
    assert _stuck(windows) == {}


def _in_bucket(window: list[Message]) -> int:
    return sum(m.elements * ITEMSIZE for m in window if not m.direct)


def _stuck(windows: dict[int, list[list[Message]]]) -> dict[int, int]:
    """Rank → the window it hangs in, when each posts a window, waits for all of it, and only then goes on."""
    at = dict.fromkeys(windows, 0)
    posted: dict[int, set[int]] = {rank: set() for rank in windows}
    while True:
        for rank, mine in windows.items():
            if at[rank] < len(mine):
                posted[rank] |= {id(m) for m in mine[at[rank]]}
        advancing = [
            rank
            for rank, mine in windows.items()
            if at[rank] < len(mine)
            and all(id(m) in posted[m.source_rank] and id(m) in posted[m.target_rank] for m in mine[at[rank]])
        ]
        if not advancing:
            return {rank: i for rank, i in at.items() if i < len(windows[rank])}
        for rank in advancing:
            at[rank] += 1


def test_the_simulator_sees_a_deadlock():
    a = architecture()
    messages = messages_of(
        make_plan(megatron_layout(a, layout_for(a, tensor=2)), whole_layout(a, [0, 1])),
        itemsize=ITEMSIZE, bucket_bytes=1000,
    )  # fmt: skip
    orders = {0: messages, 1: messages[::-1]}
    windows = {
        rank: windows_of(order, rank, itemsize=ITEMSIZE, bucket_bytes=1000, most_operations=1)
        for rank, order in orders.items()
    }
    assert len(_stuck(windows)) == 2


def test_many_pairs_are_busy_from_the_beginning():
    a = architecture("llama", layers=4, heads=8, kv_heads=8, ffn=8)
    source = megatron_layout(a, layout_for(a, tensor=4, pipeline=2))
    target = vllm_layout(a, engines=2, tensor=4, first_rank=8)
    messages = messages_of(make_plan(source, target), itemsize=ITEMSIZE, bucket_bytes=1 << 20, coalesce_below=1)
    first = messages[:16]
    assert len({m.target_rank for m in first}) == 8 and len({m.source_rank for m in first}) == 8


def test_a_run_of_several_gib_is_cut_and_stays_direct():
    rows = (1 << 30) // 1024 + 5
    layout = lambda rank: WeightLayout(  # noqa: E731
        {"w": (rows, 1024)}, {rank: (Placement("w", ((0, rows), (0, 1024)), "w", (0, 0)),)}
    )
    messages = messages_of(make_plan(layout(0), layout(1)), itemsize=2, bucket_bytes=1 << 20)
    assert [m.elements * 2 for m in messages] == [MOST_DIRECT_BYTES, MOST_DIRECT_BYTES, 5 * 2048]
    assert all(m.direct for m in messages)


@pytest.mark.parametrize("most", [1, 2, 3, 7, 12, 60, 100])
def test_cut_parts_tile_the_run_in_memory_order(most):
    (move,) = make_plan(
        WeightLayout({"w": (4, 3, 5)}, {0: (Placement("w", ((0, 4), (0, 3), (0, 5)), "w", (1, 2, 3)),)}),
        WeightLayout({"w": (4, 3, 5)}, {1: (Placement("w", ((0, 4), (0, 3), (0, 5)), "w", (0, 0, 0)),)}),
    ).moves
    parts = list(cut(move, most))
    numbers = torch.arange(60).view(4, 3, 5)
    assert all(m.elements <= most for m in parts)
    assert torch.cat([box(numbers, m.target_offset, m.shape).flatten() for m in parts]).equal(numbers.flatten())
    for m in parts:
        assert tuple(s - t for s, t in zip(m.source_offset, m.target_offset, strict=True)) == (1, 2, 3)


def test_no_messages_without_moves():
    assert messages_of(Plan(()), itemsize=2, bucket_bytes=1 << 20) == ()
