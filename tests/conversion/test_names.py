"""Stored tensors and who owns which piece of them, against shards cut the way megatron cuts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.conversion.names import (
    VOCABULARY,
    links_of,
    object_names,
    owned_boxes,
    positions,
    project,
    stage_layers,
    stored_shapes,
)
from dapo_megatron.errors import RunError
from dapo_megatron.resharding.layout import volume
from tests.resharding.worlds import PADDING, architecture, architectures, layout_for, layouts, numbered, shards


def stored_tensors(a, padded_vocab):
    """Whole stored tensors, filled through the links."""
    canonical = numbered(a)
    found = {name: torch.full(shape, PADDING) for name, shape in stored_shapes(a, padded_vocab).items()}
    for link in links_of(a):
        into = found[link.stored][tuple(slice(p, q) for p, q in link.stored_box)]
        assert torch.all(into == PADDING), "two canonical elements for one stored element"
        into.copy_(canonical[link.name][tuple(slice(p, q) for p, q in link.box)].view(into.shape))
    return found


def saved_name(key, layout, pipeline):
    """Local name of a rank's parameter → stored name and layer, as megatron numbers them."""
    chunk, _, name = key.partition(".")
    if not name.startswith("decoder.layers."):
        return name, None
    local, _, rest = name.removeprefix("decoder.layers.").partition(".")
    stage = int(chunk.removeprefix("chunk")) * layout.pipeline + pipeline
    return f"decoder.layers.{rest}", stage * layout.layers_per_chunk + int(local)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_owned_boxes_are_the_ranks_shards(data):
    a = data.draw(architectures())
    layout = data.draw(layouts(a))
    stored = stored_tensors(a, layout.padded_vocab)
    owned = owned_boxes(a, layout)
    seen = {name: torch.zeros(tensor.shape, dtype=torch.int) for name, tensor in stored.items()}
    local = shards(a, layout, numbered(a), "transformer_engine")
    for position, boxes in zip(positions(layout), owned, strict=True):
        rank = position.pipeline * layout.tensor * layout.data + position.tensor
        mine = {}
        for key, tensor in local[rank].items():
            mine[saved_name(key, layout, position.pipeline)] = tensor
        pieces = {}
        for name, box in boxes:
            seen[name][tuple(slice(p, q) for p, q in box)] += 1
            layer = box[0][0] if name.startswith("decoder.layers.") else None
            part = stored[name][tuple(slice(p, q) for p, q in box)]
            pieces.setdefault((name, layer), []).append(part[0] if layer is not None else part)
        for key, parts in pieces.items():
            assert torch.equal(torch.cat(parts), mine[key]), key  # in the order of the rank's own rows
            assert len(parts) == (2 if key[0].endswith("linear_fc1.weight") and layout.tensor > 1 else 1)
    assert all(torch.all(count == 1) for count in seen.values())


@given(architectures())
def test_links_cover_every_canonical_element_once(a):
    found = {name: torch.zeros(tensor.shape, dtype=torch.int) for name, tensor in numbered(a).items()}
    for link in links_of(a):
        found[link.name][tuple(slice(p, q) for p, q in link.box)] += 1
    assert all(torch.all(count == 1) for count in found.values())


def test_padded_rows_belong_to_stored_vocabulary_alone():
    a = architecture(vocab=70)
    stored = stored_tensors(a, 128)
    for name, tensor in stored.items():
        assert torch.any(tensor == PADDING) == (name in VOCABULARY), name
        assert name not in VOCABULARY or int((tensor == PADDING).any(1).sum()) == 58


@given(st.data())
def test_every_layer_has_one_stage(data):
    a = data.draw(architectures())
    layout = data.draw(layouts(a))
    found = [layer for p in range(layout.pipeline) for layer in stage_layers(layout, p)]
    assert sorted(found) == list(range(a.layers))


def test_objects_are_those_of_megatron():
    names = object_names(architecture(layers=2), [1])
    assert names == [
        "decoder.layers.self_attention.linear_proj._extra_state/shard_1_2",
        "decoder.layers.self_attention.linear_qkv._extra_state/shard_1_2",
        "decoder.layers.mlp.linear_fc1._extra_state/shard_1_2",
        "decoder.layers.mlp.linear_fc2._extra_state/shard_1_2",
    ]


def test_projecting_adds_and_drops_the_layer_axis():
    link = (((4, 8), (0, 6)), ((3, 4), (10, 14), (0, 6)))
    assert project(((5, 7), (1, 2)), *link) == ((3, 4), (11, 13), (1, 2))
    assert project(((3, 4), (11, 13), (1, 2)), *reversed(link)) == ((5, 7), (1, 2))


def test_a_layout_that_loses_rows_is_noticed():
    a = architecture()
    layout = layout_for(a, tensor=2)
    broken = type(layout)(**{**layout.__dict__, "layers_per_chunk": 3})
    with pytest.raises(RunError, match=r"of .* elements of decoder"):
        owned_boxes(a, broken)
    assert math.prod(stored_shapes(a, 128)["output_layer.weight"]) == volume(((0, 128), (0, a.hidden)))
