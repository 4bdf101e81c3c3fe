"""Where each canonical tensor lies on a tensor-parallel worker of vLLM, under vLLM's parameter names.

qkv_proj is [q_r; k_r; v_r] and gate_up_proj [gate_r; up_r], split by rows; o_proj and down_proj are split by columns.
With more workers than kv heads each kv head is held by several neighbours. Embedding and output rows are padded to a
multiple of 64, then split. With tied embeddings the output layer is the embedding: one parameter, one place.
Source: vLLM 0.32, model_executor/models/{qwen2,qwen3,llama}.py, layers/linear.py, layers/vocab_parallel_embedding.py.
"""

from collections.abc import Iterator

from dapo_megatron.config import Architecture
from dapo_megatron.resharding.hf_layout import canonical_tensors
from dapo_megatron.resharding.layout import Placement, WeightLayout

VOCABULARY_MULTIPLE = 64  # DEFAULT_VOCAB_PADDING_SIZE


def vllm_layout(a: Architecture, *, engines: int, tensor: int, first_rank: int) -> WeightLayout:
    """Placements of `engines` engines of `tensor` workers: worker t of engine e is rank first_rank + e·tensor + t.

    `tensor` must be a size that vLLM accepts (`config.derive.vllm_tensor_problems`).
    """
    workers = [tuple(worker_placements(a, tensor, t)) for t in range(tensor)]
    placements = {first_rank + e * tensor + t: workers[t] for e in range(engines) for t in range(tensor)}
    return WeightLayout(canonical_tensors(a), placements)


def vllm_local_shapes(a: Architecture, tensor: int) -> dict[str, tuple[int, ...]]:
    """Name → shape that every parameter of a worker must have, padding included; equal on all workers."""
    d, ffn, rows = a.head_dim, a.ffn // tensor, _vocabulary_rows(a, tensor)
    qkv_rows = (a.heads // tensor + 2 * _kv_heads(a, tensor)) * d
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (rows, a.hidden)}
    for i in range(a.layers):
        layer = f"model.layers.{i}."
        shapes[layer + "self_attn.qkv_proj.weight"] = (qkv_rows, a.hidden)
        if a.qkv_bias:
            shapes[layer + "self_attn.qkv_proj.bias"] = (qkv_rows,)
        shapes[layer + "self_attn.o_proj.weight"] = (a.hidden, a.heads // tensor * d)
        if a.qk_norm:
            shapes[layer + "self_attn.q_norm.weight"] = (d,)
            shapes[layer + "self_attn.k_norm.weight"] = (d,)
        shapes[layer + "mlp.gate_up_proj.weight"] = (2 * ffn, a.hidden)
        shapes[layer + "mlp.down_proj.weight"] = (a.hidden, ffn)
        shapes[layer + "input_layernorm.weight"] = (a.hidden,)
        shapes[layer + "post_attention_layernorm.weight"] = (a.hidden,)
    shapes["model.norm.weight"] = (a.hidden,)
    if not a.tied:
        shapes["lm_head.weight"] = (rows, a.hidden)
    return shapes


def worker_placements(a: Architecture, tensor: int, worker: int) -> Iterator[Placement]:
    """All placements of worker `worker` of an engine of `tensor` workers."""
    yield _vocabulary("model.embed_tokens.weight", a, tensor, worker)
    for i in range(a.layers):
        yield from _layer(a, tensor, worker, f"model.layers.{i}.")
    yield _rows("model.norm.weight", (0, a.hidden), "model.norm.weight", 0, None)
    if not a.tied:
        yield _vocabulary("lm_head.weight", a, tensor, worker)


def _layer(a: Architecture, tensor: int, worker: int, layer: str) -> Iterator[Placement]:
    heads, kv_heads, d = a.heads // tensor, _kv_heads(a, tensor), a.head_dim
    queries = (worker * heads * d, (worker + 1) * heads * d)
    first_kv = worker * a.kv_heads // tensor  # replicas of a head are neighbours
    keys = (first_kv * d, (first_kv + kv_heads) * d)
    for kind, columns in (("weight", a.hidden), ("bias", None)) if a.qkv_bias else (("weight", a.hidden),):
        into, offset = f"{layer}self_attn.qkv_proj.{kind}", 0
        for letter, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield _rows(f"{layer}self_attn.{letter}_proj.{kind}", rows, into, offset, columns)
            offset += rows[1] - rows[0]
    yield _columns(f"{layer}self_attn.o_proj.weight", a.hidden, queries)
    part = a.ffn // tensor
    channels = (worker * part, (worker + 1) * part)
    for offset, half in ((0, "gate"), (part, "up")):
        yield _rows(f"{layer}mlp.{half}_proj.weight", channels, f"{layer}mlp.gate_up_proj.weight", offset, a.hidden)
    yield _columns(f"{layer}mlp.down_proj.weight", a.hidden, channels)
    norms = {"input_layernorm": a.hidden, "post_attention_layernorm": a.hidden}
    if a.qk_norm:
        norms |= {"self_attn.q_norm": d, "self_attn.k_norm": d}
    for norm, size in norms.items():
        yield _rows(f"{layer}{norm}.weight", (0, size), f"{layer}{norm}.weight", 0, None)


def _kv_heads(a: Architecture, tensor: int) -> int:
    return max(1, a.kv_heads // tensor)


def _vocabulary_rows(a: Architecture, tensor: int) -> int:
    return -(-a.vocab // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE // tensor


def _vocabulary(name: str, a: Architecture, tensor: int, worker: int) -> Placement:
    part = _vocabulary_rows(a, tensor)
    return _rows(name, (min(worker * part, a.vocab), min((worker + 1) * part, a.vocab)), name, 0, a.hidden)


def _rows(name: str, rows: tuple[int, int], key: str, offset: int, columns: int | None) -> Placement:
    if columns is None:
        return Placement(name, (rows,), key, (offset,))
    return Placement(name, (rows, (0, columns)), key, (offset, 0))


def _columns(name: str, rows: int, columns: tuple[int, int]) -> Placement:
    return Placement(name, ((0, rows), columns), name, (0, 0))
