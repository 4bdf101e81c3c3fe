import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.config import Architecture
from dapo_megatron.resharding.vllm_layout import vllm_layout, vllm_local_shapes
from tests.resharding.worlds import PADDING, architecture, architectures, numbered, vllm_sizes, vllm_worker

MODELS = architectures().flatmap(lambda a: st.tuples(st.just(a), st.sampled_from(vllm_sizes(a))))


@given(MODELS, st.integers(1, 3), st.integers(0, 5))
@settings(deadline=None, max_examples=80)
def test_placements_fill_every_element_of_every_parameter_once(
    model: tuple[Architecture, int], engines: int, first_rank: int
):
    a, tensor = model
    whole = numbered(a)
    found = vllm_layout(a, engines=engines, tensor=tensor, first_rank=first_rank)
    assert found.shapes == {name: tuple(t.shape) for name, t in whole.items()}
    assert list(found.placements) == list(range(first_rank, first_rank + engines * tensor))
    for worker in range(tensor):
        expected = vllm_worker(a, whole, tensor, worker)
        assert vllm_local_shapes(a, tensor) == {name: tuple(t.shape) for name, t in expected.items()}
        for engine in range(engines):
            filled = {name: torch.full_like(t, PADDING) for name, t in expected.items()}
            writes = {name: torch.zeros_like(t) for name, t in expected.items()}
            for p in found.placements[first_rank + engine * tensor + worker]:
                inside = tuple(slice(o, o + n) for o, n in zip(p.offset, p.shape, strict=True))
                filled[p.key][inside] = whole[p.name][tuple(slice(*edge) for edge in p.box)]
                writes[p.key][inside] += 1
            for name, t in expected.items():
                assert torch.equal(filled[name], t), (worker, name)
                assert torch.equal(writes[name], (t != PADDING).long()), (worker, name)


def test_more_workers_than_kv_heads_repeat_each_head_on_neighbours():
    a = architecture(heads=8, kv_heads=2, head_dim=4)
    layout = vllm_layout(a, engines=1, tensor=4, first_rank=0)
    keys = [
        p.box[0]
        for worker in range(4)
        for p in layout.placements[worker]
        if p.name == "model.layers.0.self_attn.k_proj.weight"
    ]
    assert keys == [(0, 4), (0, 4), (4, 8), (4, 8)]


def test_tied_embeddings_have_one_place():
    a = architecture(tied=True)
    assert "lm_head.weight" not in vllm_local_shapes(a, 2)
    keys = [p.key for p in vllm_layout(a, engines=1, tensor=2, first_rank=0).placements[0] if p.key.count(".") == 2]
    assert keys == ["model.embed_tokens.weight", "model.norm.weight"]


def test_a_worker_of_padding_alone_wants_nothing_of_the_vocabulary():
    a = architecture(heads=8, kv_heads=8, ffn=8, vocab=3)
    layout = vllm_layout(a, engines=1, tensor=8, first_rank=0)
    sizes = [p.shape[0] for w in range(8) for p in layout.placements[w] if p.name == "lm_head.weight"]
    assert sizes == [3, 0, 0, 0, 0, 0, 0, 0]
    assert vllm_local_shapes(a, 8)["lm_head.weight"] == (8, a.hidden)
