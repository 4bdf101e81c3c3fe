from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.errors import RunError
from dapo_megatron.resharding.hf_layout import canonical_tensors, whole_layout
from dapo_megatron.resharding.layout import Placement, WeightLayout
from dapo_megatron.resharding.megatron_layout import megatron_layout
from dapo_megatron.resharding.plan import make_plan
from tests.resharding.worlds import (
    PADDING,
    architecture,
    architectures,
    carry_out,
    layout_for,
    layouts,
    numbered,
    shards,
)  # fmt: skip

MODELS = architectures().flatmap(lambda a: st.tuples(st.just(a), layouts(a)))
PAIRS = MODELS.flatmap(lambda m: st.tuples(st.just(m[0]), st.just(m[1]), layouts(m[0], world=m[1].world)))


@given(MODELS, st.data())
@settings(deadline=None, max_examples=80)
def test_to_whole_models_with_the_fewest_elements_moved(model, data):
    a, layout = model
    takers = data.draw(st.sets(st.integers(0, layout.world - 1), min_size=1, max_size=3))
    whole = numbered(a)
    source = shards(a, layout, whole)
    plan = make_plan(megatron_layout(a, layout), whole_layout(a, takers))
    target = {rank: {name: torch.full_like(t, PADDING) for name, t in whole.items()} for rank in takers}
    carry_out(plan, source, target)
    for rank in takers:
        for name, tensor in whole.items():
            assert torch.equal(target[rank][name], tensor), (rank, name)
    # nothing that lies in the taker's own process travels, everything else does once
    minimum = 0
    for rank in takers:
        held = torch.cat([t.flatten() for t in source[rank].values()]).unique()
        minimum += sum(t.numel() for t in whole.values()) - int((held != PADDING).sum())
    assert plan.elements_moved == minimum
    assert sum(m.elements for m in plan.moves) == len(takers) * sum(t.numel() for t in whole.values())


@given(PAIRS)
@settings(deadline=None, max_examples=80)
def test_between_two_megatron_layouts(pair):
    a, first, second = pair
    whole = numbered(a)
    wanted = shards(a, second, whole)
    plan = make_plan(megatron_layout(a, first), megatron_layout(a, second))
    sentinel = -7  # what a move may not touch: the padded rows
    target = {
        rank: {key: torch.full_like(tensor, sentinel) for key, tensor in local.items()}
        for rank, local in wanted.items()
    }
    carry_out(plan, shards(a, first, whole), target)
    for rank, local in wanted.items():
        for key, tensor in local.items():
            expected = torch.where(tensor == PADDING, sentinel, tensor)
            assert torch.equal(target[rank][key], expected), (rank, key)


@given(MODELS)
@settings(deadline=None, max_examples=30)
def test_from_whole_models_and_every_rank_sees_the_same_plan(model):
    a, layout = model
    whole = numbered(a)
    plan = make_plan(whole_layout(a, [0]), megatron_layout(a, layout))
    wanted = shards(a, layout, whole)
    target = {r: {key: torch.full_like(t, PADDING) for key, t in local.items()} for r, local in wanted.items()}
    carry_out(plan, {0: whole}, target)
    assert all(torch.equal(target[r][key], t) for r, local in wanted.items() for key, t in local.items())
    assert make_plan(whole_layout(a, [0]), megatron_layout(a, layout)) == plan


def test_equal_layouts_move_nothing():
    a = architecture(tied=True)
    layout = megatron_layout(a, layout_for(a, tensor=2, pipeline=2, virtual=2, data=2))
    plan = make_plan(layout, layout)
    assert plan.elements_moved == 0 and plan.moves


def test_replicas_share_the_sending():
    a = architecture("llama", layers=2)
    source = megatron_layout(a, layout_for(a, data=4))
    # four givers that hold all, four takers that hold nothing
    plan = make_plan(source, whole_layout(a, [4, 5, 6, 7]))
    sent = [sum(m.elements for m in plan.moves if m.source_rank == rank) for rank in range(4)]
    largest = max(m.elements for m in plan.moves)
    assert sum(sent) == plan.elements_moved and max(sent) - min(sent) <= largest


def _without(layout: WeightLayout, name: str, ranks: set[int]) -> WeightLayout:
    kept = {
        rank: tuple(p for p in placements if rank not in ranks or p.name != name)
        for rank, placements in layout.placements.items()
    }
    return replace(layout, placements=kept)


def test_a_missing_source_slice_is_named():
    a = architecture()
    source = megatron_layout(a, layout_for(a, tensor=2, data=2))
    name = "model.layers.2.mlp.up_proj.weight"
    target = whole_layout(a, [0])
    make_plan(_without(source, name, {1}), target)  # the replica on rank 3 still has it
    with pytest.raises(RunError, match=name + ".*rank 0.*needs 48 elements.*supplies 24"):
        make_plan(_without(source, name, {1, 3}), target)
    with pytest.raises(RunError, match=name + ".*supplies 0"):
        make_plan(_without(source, name, {0, 1, 2, 3}), target)


def _rows(*boxes: tuple[int, int]) -> WeightLayout:
    placements = {rank: (Placement("w", (box,), "w", (0,)),) for rank, box in enumerate(boxes)}
    return WeightLayout({"w": (6,)}, placements)


@pytest.mark.parametrize(
    "boxes",
    [
        ((0, 3), (2, 5)),  # 6 elements in all, but row 2 twice and row 5 never
        ((0, 4), (2, 6)),
        ((0, 6), (0, 3)),
    ],
)
def test_overlapping_source_slices_are_refused_even_when_the_count_is_right(boxes):
    with pytest.raises(RunError, match="w "):
        make_plan(_rows(*boxes), _rows((0, 6)))


def test_a_different_model_is_refused_by_name():
    tied, untied = architecture(tied=True), architecture(tied=False)
    with pytest.raises(RunError, match=r"lm_head\.weight.*only in the target"):
        make_plan(megatron_layout(tied, layout_for(tied)), whole_layout(untied, [0]))
    with pytest.raises(RunError, match=r"lm_head\.weight.*only in the source"):
        make_plan(megatron_layout(untied, layout_for(untied)), whole_layout(tied, [0]))
    deeper = architecture(layers=5)
    with pytest.raises(RunError, match=r"model\.layers\.4\."):
        make_plan(megatron_layout(untied, layout_for(untied)), whole_layout(deeper, [0]))


def test_another_shape_is_refused_by_name():
    a, wider = architecture(), architecture(ffn=16)
    with pytest.raises(RunError, match=r"model\.layers\.0\.mlp\.gate_proj\.weight is \(8, 6\).*\(16, 6\)"):
        make_plan(megatron_layout(a, layout_for(a)), whole_layout(wider, [0]))


def test_a_part_of_the_tensors_by_name():
    a = architecture()
    names = [name for name in canonical_tensors(a) if "norm" in name]
    target = whole_layout(a, [1], names)
    assert set(target.shapes) == set(names) and {p.name for p in target.placements[1]} == set(names)
