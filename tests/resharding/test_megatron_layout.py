import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.config import Architecture, Layout
from dapo_megatron.resharding.megatron_layout import megatron_layout, position_of
from tests.resharding.worlds import PADDING, architecture, architectures, layout_for, layouts, numbered, shards

MODELS = architectures().flatmap(lambda a: st.tuples(st.just(a), layouts(a)))


@given(MODELS, st.sampled_from(["local", "transformer_engine"]))
@settings(deadline=None, max_examples=100)
def test_placements_fill_every_element_of_every_shard_once(model: tuple[Architecture, Layout], layer_spec: str):
    a, layout = model
    whole = numbered(a)
    expected = shards(a, layout, whole, layer_spec)
    found = megatron_layout(a, layout, layer_spec=layer_spec)
    assert found.shapes == {name: tuple(tensor.shape) for name, tensor in whole.items()}
    assert set(found.placements) == set(range(layout.world)) == set(expected)
    for rank, local in expected.items():
        filled = {key: torch.full_like(tensor, PADDING) for key, tensor in local.items()}
        writes = {key: torch.zeros_like(tensor) for key, tensor in local.items()}
        for p in found.placements[rank]:
            inside = tuple(slice(o, o + n) for o, n in zip(p.offset, p.shape, strict=True))
            filled[p.key][inside] = whole[p.name][tuple(slice(*edge) for edge in p.box)]
            writes[p.key][inside] += 1
        for key, tensor in local.items():
            assert torch.equal(filled[key], tensor), (rank, key)
            assert torch.equal(writes[key], (tensor != PADDING).long()), (rank, key)


def test_positions_follow_megatrons_rank_order():
    layout = layout_for(architecture(), tensor=2, pipeline=2, data=2)
    found = [(position_of(rank, layout).tensor, position_of(rank, layout).pipeline) for rank in range(8)]
    assert found == [(0, 0), (1, 0), (0, 0), (1, 0), (0, 1), (1, 1), (0, 1), (1, 1)]


def test_more_ranks_than_kv_heads_cut_inside_a_group():
    # one group of rows [q0 q1 q2 q3, k, v] x head_dim 4 = 24 rows over 4 ranks of 6
    a = architecture(heads=4, kv_heads=1, head_dim=4, family="llama")
    layout = layout_for(a, tensor=4)
    last = [
        (p.name.rpartition("self_attn.")[2], p.box[0], p.offset[0])
        for p in megatron_layout(a, layout).placements[3]
        if p.key == "chunk0.decoder.layers.0.self_attention.linear_qkv.weight"
    ]
    assert last == [("k_proj.weight", (2, 4), 0), ("v_proj.weight", (0, 4), 2)]
