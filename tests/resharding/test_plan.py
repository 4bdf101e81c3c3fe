from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.errors import RunError
from dapo_megatron.resharding import plan as plan_module
from dapo_megatron.resharding.hf_layout import canonical_tensors, whole_layout
from dapo_megatron.resharding.layout import Placement, WeightLayout
from dapo_megatron.resharding.megatron_layout import megatron_layout
from dapo_megatron.resharding.minimum import minimum_elements
from dapo_megatron.resharding.plan import make_plan
from dapo_megatron.resharding.vllm_layout import vllm_layout
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
    assert (
        plan.elements_moved
        == minimum
        == sum(minimum_elements(megatron_layout(a, layout), whole_layout(a, takers)).values())
    )
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
    held = shards(a, first, whole)
    carry_out(plan, held, target)
    fewest = 0
    for rank, local in wanted.items():
        mine = torch.cat([t.flatten() for t in held[rank].values()])
        for key, tensor in local.items():
            fewest += int(((tensor != PADDING) & ~torch.isin(tensor, mine)).sum())
            expected = torch.where(tensor == PADDING, sentinel, tensor)
            assert torch.equal(target[rank][key], expected), (rank, key)
    assert plan.elements_moved == fewest


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


def test_each_move_goes_to_the_replica_that_has_sent_least(monkeypatch):
    # also tiny runs are chosen for one by one
    monkeypatch.setattr(plan_module, "SHARED_CHOICE", 1)
    a = architecture("llama", layers=2)
    plan = make_plan(megatron_layout(a, layout_for(a, data=4)), whole_layout(a, [4, 5, 6]))
    sent = [sum(m.elements for m in plan.moves if m.source_rank == rank) for rank in range(4)]
    assert max(sent) - min(sent) <= max(m.elements for m in plan.moves)


def test_small_runs_of_a_target_share_a_sender_and_targets_do_not():
    a = architecture(layers=4, heads=8, kv_heads=8, ffn=8, vocab=128)
    source = megatron_layout(a, layout_for(a, tensor=4, data=4))
    plan = make_plan(source, vllm_layout(a, engines=4, tensor=4, first_rank=16))
    norms = [m for m in plan.moves if "norm" in m.name]  # on all 16 ranks
    assert len({(m.target_rank, m.source_rank) for m in norms}) == 16
    assert max(Counter(m.source_rank for m in norms).values()) <= 2 * (2 * a.layers + 1)
    sent = Counter({rank: 0 for rank in range(16)})
    for m in plan.moves:
        sent[m.source_rank] += m.elements
    assert max(sent.values()) - min(sent.values()) <= sum(m.elements for m in norms) / 16


def test_what_all_ranks_hold_comes_from_those_that_send_little():
    # of 128 padded vocabulary rows the last quarter's ranks have 4 to send, the others 32
    a = architecture(layers=4, heads=8, kv_heads=8, ffn=8, vocab=100)
    source = megatron_layout(a, layout_for(a, tensor=4, data=4))
    plan = make_plan(source, vllm_layout(a, engines=4, tensor=4, first_rank=16))
    assert {m.source_rank for m in plan.moves if "norm" in m.name} == {3, 7, 11, 15}


QWEN25_32B_SHAPE = {"layers": 1, "hidden": 8, "heads": 40, "kv_heads": 8, "head_dim": 4, "ffn": 16, "vocab": 512}


@pytest.mark.parametrize(
    ("source_tensor", "target_tensor", "runs", "contiguous"),
    [
        # qkv, o, gate_up, down, embedding, norm; o and down are strided where the sizes differ
        (8, 8, (1, 1, 1, 1, 1, 1), True),
        (4, 4, (6, 1, 1, 1, 1, 1), True),
        (1, 4, (6, 1, 2, 1, 1, 1), False),
        (2, 4, (6, 1, 2, 1, 1, 1), False),
        (8, 4, (6, 2, 4, 2, 2, 1), False),
        (4, 1, (24, 4, 8, 4, 4, 1), False),
        (8, 1, (24, 8, 16, 8, 8, 1), False),
        (1, 1, (24, 1, 1, 1, 1, 1), True),
    ],
)
def test_runs_of_a_worker(source_tensor, target_tensor, runs, contiguous):
    a = architecture(**QWEN25_32B_SHAPE)
    source = megatron_layout(a, layout_for(a, tensor=source_tensor, data=2))
    first_rank = 2 * source_tensor
    plan = make_plan(source, vllm_layout(a, engines=2, tensor=target_tensor, first_rank=first_rank))
    layer = "model.layers.0."
    for worker in range(2 * target_tensor):
        mine = [m for m in plan.moves if m.target_rank == first_rank + worker]
        found = Counter(m.target_key for m in mine)
        qkv, o, gate_up, down, embedding, norm = runs
        assert found[layer + "self_attn.qkv_proj.weight"] == found[layer + "self_attn.qkv_proj.bias"] == qkv
        assert found[layer + "self_attn.o_proj.weight"] == o and found[layer + "mlp.down_proj.weight"] == down
        assert found[layer + "mlp.gate_up_proj.weight"] == gate_up
        assert found["model.embed_tokens.weight"] == found["lm_head.weight"] == embedding
        assert found[layer + "input_layernorm.weight"] == found["model.norm.weight"] == norm
        for m in mine:
            split_by_columns = m.target_key.endswith(("o_proj.weight", "down_proj.weight"))
            assert m.contiguous == (contiguous or not split_by_columns), m


def test_neighbours_at_one_end_alone_are_not_merged():
    rows = lambda *offsets: tuple(  # noqa: E731
        Placement("w", ((2 * i, 2 * i + 2),), "w", (offset,)) for i, offset in enumerate(offsets)
    )
    close, apart = (0, 2, 4), (0, 3, 5)
    for giver, taker, runs in ((close, close, 1), (close, apart, 2), (apart, close, 2), (apart, apart, 2)):
        plan = make_plan(WeightLayout({"w": (6,)}, {0: rows(*giver)}), WeightLayout({"w": (6,)}, {1: rows(*taker)}))
        assert [m.shape for m in plan.moves] == ([(6,)] if runs == 1 else [(2,), (4,)]), (giver, taker)


def test_a_merged_run_names_all_its_tensors():
    a = architecture(**QWEN25_32B_SHAPE)
    plan = make_plan(megatron_layout(a, layout_for(a, tensor=8)), vllm_layout(a, engines=1, tensor=8, first_rank=8))
    names = {m.name for m in plan.moves if m.target_key.endswith("qkv_proj.bias")}
    layer = "model.layers.0.self_attn."
    assert names == {f"{layer}q_proj.bias + {layer}k_proj.bias + {layer}v_proj.bias"}


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


def test_two_slices_for_one_place_are_refused():
    target = WeightLayout(
        {"w": (6,)}, {3: (Placement("w", ((0, 4),), "local", (0,)), Placement("w", ((4, 6),), "local", (3,)))}
    )
    with pytest.raises(RunError, match=r"w \(\(0, 4\),\) and w \(\(4, 6\),\).*local on rank 3"):
        make_plan(_rows((0, 6)), target)


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
