"""How canonical tensors lie in the tensors of a Megatron checkpoint, and which pieces of those a rank owns.

A checkpoint stores whole tensors in pieces: per-layer parameters stacked along a leading layer axis
(`decoder.layers.mlp.linear_fc2.weight` [layers, hidden, ffn]), the vocabulary's with their padded rows, all under the
names of TransformerEngine's layers, which megatron saves local layers under as well. Such a stored tensor is what the
one rank of an uncut world holds, so both its links to the canonical tensors and the pieces of a rank follow from
`rank_placements`: no model is built.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dapo_megatron.config import Architecture, Layout
from dapo_megatron.errors import RunError
from dapo_megatron.resharding.layout import Box, Placement, intersect, volume, whole
from dapo_megatron.resharding.megatron_layout import MegatronPosition, rank_placements

SAVED_NAMES = "transformer_engine"
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")  # stored with padded rows
OPTIMIZER = "optimizer."
STACKED = "decoder.layers."  # a leading axis counts the layers
LINEARS = ("self_attention.linear_proj", "self_attention.linear_qkv", "mlp.linear_fc1", "mlp.linear_fc2")
"""megatron's linears save an `_extra_state` object a layer beside their weights; without FP8 it is empty."""


@dataclass(frozen=True, slots=True)
class Link:
    """`box` of the canonical tensor `name` is `stored_box` of `stored`: same rows and columns, in the same order."""

    name: str
    box: Box
    stored: str
    stored_box: Box


def links_of(a: Architecture) -> tuple[Link, ...]:
    """All links of the architecture. Every canonical element has one; of stored elements, all but padded rows."""
    found = []
    for placement in rank_placements(a, _uncut(a), MegatronPosition(0, 0), layer_spec=SAVED_NAMES):
        stored, layer = _stored_name(placement)
        inside = tuple((o, o + n) for o, n in zip(placement.offset, placement.shape, strict=True))
        found.append(Link(placement.name, placement.box, stored, (*layer, *inside)))
    return tuple(found)


def stored_shapes(a: Architecture, padded_vocab: int) -> dict[str, tuple[int, ...]]:
    """Stored name → whole shape, in the order of the model."""
    shapes: dict[str, tuple[int, ...]] = {}
    for link in links_of(a):
        ends = tuple(stop for _, stop in link.stored_box)
        shapes[link.stored] = tuple(map(max, shapes.get(link.stored, ends), ends))
    padded = VOCABULARY[:1] if a.value_head else VOCABULARY  # a critic's output layer is its value head
    return {name: (padded_vocab, a.hidden) if name in padded else shape for name, shape in shapes.items()}


def positions(layout: Layout) -> list[MegatronPosition]:
    """Model-parallel positions in the order of their files."""
    return [MegatronPosition(t, p) for p in range(layout.pipeline) for t in range(layout.tensor)]


def owned_boxes(a: Architecture, layout: Layout) -> list[list[tuple[str, Box]]]:
    """For each of `positions(layout)`, the boxes of stored tensors that it writes; what several hold, the first writes.

    Raises:
        RunError: the boxes do not make up a stored tensor (the layout is inconsistent).
    """
    by_name: dict[str, list[Link]] = defaultdict(list)
    for link in links_of(a):
        by_name[link.name].append(link)
    taken: set[tuple[str, Box]] = set()
    owned = []
    for position in positions(layout):
        mine = []
        for stored, boxes in _held_boxes(a, layout, position, by_name).items():
            for box in _merge_rows(boxes, 1 if stored.startswith(STACKED) else 0):
                if (stored, box) not in taken:
                    taken.add((stored, box))
                    mine.append((stored, box))
        owned.append(mine)
    _check_complete(stored_shapes(a, layout.padded_vocab), taken)
    return owned


def object_names(a: Architecture, layers: Iterable[int]) -> list[str]:
    """Names of the objects that a checkpoint holds beside the tensors of these layers."""
    return [f"decoder.layers.{linear}._extra_state/shard_{i}_{a.layers}" for i in layers for linear in LINEARS]


def stage_layers(layout: Layout, pipeline: int) -> list[int]:
    """Global numbers of the layers on a pipeline rank."""
    stages = [v * layout.pipeline + pipeline for v in range(layout.virtual_pipeline)]
    return [s * layout.layers_per_chunk + i for s in stages for i in range(layout.layers_per_chunk)]


def project(box: Box, source: Box, target: Box) -> Box:
    """Where `box`, inside `source`, lies in the linked box `target`; a leading layer axis comes or goes."""
    inner = min(len(source), len(target))
    moved = tuple(
        (t + a - s, t + b - s)
        for (a, b), (s, _), (t, _) in zip(box[-inner:], source[-inner:], target[-inner:])  # noqa: B905
    )
    return (*target[:-inner], *moved)


def _uncut(a: Architecture) -> Layout:
    return Layout(
        world=1, tensor=1, pipeline=1, virtual_pipeline=1, context=1, data=1, sequence_parallel=False,
        layers_per_chunk=a.layers, mini_batch_prompts=1, updates_per_step=1, responses_per_step=1, padded_vocab=a.vocab,
    )  # fmt: skip


def _stored_name(placement: Placement) -> tuple[str, Box]:
    """(stored name, box of the leading layer axis) of a placement's local tensor."""
    key = placement.key.partition(".")[2]
    if match := re.fullmatch(r"decoder\.layers\.\d+\.(.+)", key):
        layer = int(placement.name.split(".")[2])  # the canonical name counts layers through all chunks
        return f"decoder.layers.{match[1]}", ((layer, layer + 1),)
    return key, ()


def _held_boxes(
    a: Architecture, layout: Layout, position: MegatronPosition, by_name: Mapping[str, list[Link]]
) -> dict[str, list[Box]]:
    part = layout.padded_vocab // layout.tensor
    held: dict[str, list[Box]] = defaultdict(list)
    for placement in rank_placements(a, layout, position, layer_spec=SAVED_NAMES):
        for link in by_name[placement.name]:
            if link.stored in VOCABULARY:  # padded rows, which belong to no canonical tensor, are stored too
                rows = (position.tensor * part, (position.tensor + 1) * part)
                held[link.stored].append((rows, (0, a.hidden)))
            elif (common := intersect(placement.box, link.box)) is not None:
                held[link.stored].append(project(common, link.box, link.stored_box))
    return held


def _merge_rows(boxes: list[Box], axis: int) -> list[Box]:
    """Boxes with neighbouring rows become one: a rank's query, key and value rows, not its gate and up rows."""
    merged: list[Box] = []
    for box in sorted(boxes):
        if merged and _joins(merged[-1], box, axis):
            last = merged.pop()
            box = (*last[:axis], (last[axis][0], box[axis][1]), *last[axis + 1 :])
        merged.append(box)
    return merged


def _joins(last: Box, box: Box, axis: int) -> bool:
    same = all(p == q for i, (p, q) in enumerate(zip(last, box, strict=True)) if i != axis)
    return same and last[axis][1] == box[axis][0]


def _check_complete(shapes: Mapping[str, tuple[int, ...]], taken: set[tuple[str, Box]]) -> None:
    found: dict[str, int] = defaultdict(int)
    for name, box in taken:
        found[name] += volume(box)
    for name, shape in shapes.items():
        if found[name] != volume(whole(shape)):
            raise RunError(f"the layout holds {found[name]} of {volume(whole(shape))} elements of {name}")
