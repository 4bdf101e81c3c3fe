"""Where each canonical tensor lies on a Megatron rank, by tensor-, pipeline- and virtual-pipeline position.

linear_qkv holds, for each kv group, [its query heads, its key head, its value head], row by row, cut evenly over the
tensor-parallel ranks: with more ranks than kv heads a cut may fall inside q, k or v. linear_fc1 holds [gate_r; up_r].
Embedding and output rows are cut evenly after padding to a multiple of lcm(TP, 64); padded rows belong to no canonical
tensor.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dapo_megatron.config import Architecture, Layout
from dapo_megatron.resharding.hf_layout import canonical_tensors
from dapo_megatron.resharding.layout import Placement, WeightLayout


@dataclass(frozen=True)
class MegatronPosition:
    """Coordinates of a rank in the model-parallel grid."""

    tensor: int
    pipeline: int


def position_of(rank: int, layout: Layout) -> MegatronPosition:
    """megatron's default order tp-cp-dp-pp: tensor ranks are neighbours, pipeline stages are furthest apart."""
    return MegatronPosition(rank % layout.tensor, rank // (layout.tensor * layout.context * layout.data))


def megatron_layout(a: Architecture, layout: Layout, *, layer_spec: str = "local") -> WeightLayout:
    """Placements of every rank of the world. Keys are `chunk{v}.{parameter name}`."""
    by_position: dict[MegatronPosition, tuple[Placement, ...]] = {}
    placements = {}
    for rank in range(layout.world):
        position = position_of(rank, layout)
        if position not in by_position:
            by_position[position] = tuple(rank_placements(a, layout, position, layer_spec=layer_spec))
        placements[rank] = by_position[position]
    return WeightLayout(canonical_tensors(a), placements)


def rank_placements(
    a: Architecture, layout: Layout, position: MegatronPosition, *, layer_spec: str = "local"
) -> Iterator[Placement]:
    """All placements of one model-parallel rank, chunk after chunk."""
    stages = layout.pipeline * layout.virtual_pipeline
    for v in range(layout.virtual_pipeline):
        stage = v * layout.pipeline + position.pipeline
        prefix = f"chunk{v}."
        if stage == 0:
            yield _vocabulary(
                "model.embed_tokens.weight", prefix + "embedding.word_embeddings.weight", a, layout, position
            )
        for local in range(layout.layers_per_chunk):
            yield from _layer(
                a,
                layout,
                position,
                stage * layout.layers_per_chunk + local,
                f"{prefix}decoder.layers.{local}.",
                layer_spec,
            )
        if stage == stages - 1:
            yield _rows("model.norm.weight", (0, a.hidden), prefix + "decoder.final_layernorm.weight", 0)
            if a.value_head:  # whole on every tensor-parallel rank
                yield _rows("score.weight", (0, 1), prefix + "output_layer.weight", 0, a.hidden)
                yield _rows("score.bias", (0, 1), prefix + "output_layer.bias", 0)
            elif not a.tied:
                yield _vocabulary("lm_head.weight", prefix + "output_layer.weight", a, layout, position)
            elif stages > 1:  # the last stage keeps a copy of the tied embedding
                yield _vocabulary("model.embed_tokens.weight", prefix + "output_layer.weight", a, layout, position)


def _layer(
    a: Architecture, layout: Layout, position: MegatronPosition, index: int, local: str, layer_spec: str
) -> Iterator[Placement]:
    name = f"model.layers.{index}."
    fused = layer_spec == "transformer_engine"  # its linears hold the norm in front of them
    attention_norm = "self_attention.linear_qkv.layer_norm_weight" if fused else "input_layernorm.weight"
    mlp_norm = "mlp.linear_fc1.layer_norm_weight" if fused else "pre_mlp_layernorm.weight"
    yield _rows(name + "input_layernorm.weight", (0, a.hidden), local + attention_norm, 0)
    yield from _qkv(a, layout, position, name, local, "weight")
    if a.qkv_bias:
        yield from _qkv(a, layout, position, name, local, "bias")
    if a.qk_norm:
        for letter in "qk":
            yield _rows(
                f"{name}self_attn.{letter}_norm.weight",
                (0, a.head_dim),
                f"{local}self_attention.{letter}_layernorm.weight",
                0,
            )
    yield _columns(
        name + "self_attn.o_proj.weight",
        a.hidden,
        a.heads * a.head_dim,
        local + "self_attention.linear_proj.weight",
        layout,
        position,
    )
    yield _rows(name + "post_attention_layernorm.weight", (0, a.hidden), local + mlp_norm, 0)
    part = a.ffn // layout.tensor
    rows = (position.tensor * part, (position.tensor + 1) * part)
    yield _rows(name + "mlp.gate_proj.weight", rows, local + "mlp.linear_fc1.weight", 0, a.hidden)
    yield _rows(name + "mlp.up_proj.weight", rows, local + "mlp.linear_fc1.weight", part, a.hidden)
    yield _columns(name + "mlp.down_proj.weight", a.hidden, a.ffn, local + "mlp.linear_fc2.weight", layout, position)


def _qkv(
    a: Architecture, layout: Layout, position: MegatronPosition, name: str, local: str, kind: str
) -> Iterator[Placement]:
    """Cut the interleaved rows [q … q, k, v] of all kv groups at this rank's borders."""
    queries = a.heads // a.kv_heads
    total = a.kv_heads * (queries + 2) * a.head_dim
    first, last = (position.tensor * total // layout.tensor, (position.tensor + 1) * total // layout.tensor)
    columns = a.hidden if kind == "weight" else None
    row = 0
    for group in range(a.kv_heads):
        for letter, heads, start in (("q", queries, group * queries), ("k", 1, group), ("v", 1, group)):
            size = heads * a.head_dim
            low, high = max(first, row), min(last, row + size)
            if low < high:
                canonical = start * a.head_dim + low - row
                yield _rows(
                    f"{name}self_attn.{letter}_proj.{kind}",
                    (canonical, canonical + high - low),
                    f"{local}self_attention.linear_qkv.{kind}",
                    low - first,
                    columns,
                )
            row += size


def _vocabulary(name: str, key: str, a: Architecture, layout: Layout, position: MegatronPosition) -> Placement:
    part = layout.padded_vocab // layout.tensor
    first = position.tensor * part
    return _rows(name, (min(first, a.vocab), min(first + part, a.vocab)), key, 0, a.hidden)


def _rows(name: str, rows: tuple[int, int], key: str, offset: int, columns: int | None = None) -> Placement:
    if columns is None:
        return Placement(name, (rows,), key, (offset,))
    return Placement(name, (rows, (0, columns)), key, (offset, 0))


def _columns(name: str, rows: int, columns: int, key: str, layout: Layout, position: MegatronPosition) -> Placement:
    part = columns // layout.tensor
    return Placement(name, ((0, rows), (position.tensor * part, (position.tensor + 1) * part)), key, (0, 0))
