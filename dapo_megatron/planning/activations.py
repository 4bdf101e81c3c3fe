"""Bytes that layers keep for their backward pass, and how many micro-batches at once.

Letters: T rows of a micro-batch on a rank (the token budget / c), S = T / t under sequence parallelism, else T;
t tensor- and c context-parallel size; h hidden, f ffn, d head size, q = heads x d, k = kv heads x d; b bytes a number
(bf16 2).
"""

from typing import Literal

from dapo_megatron.config import Architecture, Layout, Recipe
from dapo_megatron.planning.weights import FP32, ITEMSIZE, LayerSpec

Attention = Literal["transformer_engine", "varlen", "torch"]
"""What computes attention: TransformerEngine's layers; or local layers with one variable-length flash call (GPUs), or
with torch's own, sequences of like length at a time (CPUs)."""


def attention_of(recipe: Recipe) -> Attention:
    """What plans count with: on GPUs `auto` means TransformerEngine, which belongs to such a machine."""
    if recipe.learner.device == "cpu":
        return "torch"
    return "varlen" if recipe.model.layer_spec == "local" else "transformer_engine"


def spec_of(attention: Attention) -> LayerSpec:
    """The layers around it."""
    return "transformer_engine" if attention == "transformer_engine" else "local"


def micro_batch_rows(recipe: Recipe, layout: Layout) -> int:
    """T: rows of a full micro-batch on a rank, a multiple of t."""
    share = layout.tensor * layout.context
    return -(-recipe.learner.tokens_per_micro_batch // share) * layout.tensor


def scattered_rows(layout: Layout, rows: int) -> float:
    """S: rows of residuals and norms on a rank."""
    return rows / layout.tensor if layout.sequence_parallel else rows


def kept_bytes(
    a: Architecture, layout: Layout, rows: int, *, dtype: str, attention: Attention, length: int, again: bool = False
) -> float:
    """What one layer keeps for its backward pass.

    TransformerEngine:
        norms         2 S h x 2 b                    input, output
        q, k norms    T (q + k) / t x b
        attention     T (b (3 q + 3 k) + 4 heads) / t   qkv, turned q and k, output, log-sums
        feed-forward  T f / t x 3 b                  gate and up, product
    local:
        norms         2 S h x 8                      bf16: input in fp32, normalised, output; fp32: input, output,
                          on CPUs in fp32 12         and on CPUs, whose norm is not one kernel, normalised
        q, k norms    T (q + k) / t x 6              bf16: input in fp32, normalised; fp32 4, normalised
        cos, sin      4 T d b                        of q and of k, on every rank
        feed-forward  T f / t x 5 b                  gate, up, up + 0, silu(gate), product
        attention     varlen as TransformerEngine's; torch:
                      T (b (4 q + 2 k) + 4 heads) / t   q, k, v gathered by sequence; output there, in rows, and placed
                      T b (q + 2 k) / t              qkv, where a norm of fp32 q and k looks at it
                      with context parallelism k counts (2 c + 1) / 2 times, and every layer keeps its masks as numbers
                      c T length (2 c + 1) / (4 c^2) b

    `again` (recompute=selective): attention keeps what it is given, T b (3 q + 3 k) / t. `length`: rows of the longest
    sequence, which is how long all are taken to be. Where t exceeds the kv heads qkv is whole on every rank.
    """
    b, t, c, local = ITEMSIZE[dtype], layout.tensor, layout.context, attention != "transformer_engine"
    slow = attention == "torch"
    queries, keys = a.heads * a.head_dim / t, max(a.kv_heads / t, 1) * a.head_dim
    half = b < FP32
    norms = 2 * scattered_rows(layout, rows) * a.hidden * ((12 if slow and not half else 8) if local else 2 * b)
    head_norms = (queries + keys) * ((6 if half else 4) if local else b) if a.qk_norm else 0
    turns = 4 * a.head_dim * b if local else 0
    feed_forward = a.ffn / t * b * (5 if local else 3)
    qkv = b * (a.heads + 2 * a.kv_heads) * a.head_dim / (t if a.kv_heads >= t else 1)
    squares = 0.0
    if not slow:
        core = b * 3 * (queries + keys) + FP32 * a.heads / t
    elif again:
        core = qkv + b * (2 * queries + keys)
    else:
        core = b * (4 * queries + 2 * keys) + FP32 * a.heads / t
        if c > 1:
            core = b * (4 * queries + (2 * c + 1) * keys) + FP32 * a.heads / t
            squares = c * rows * min(length, c * rows) * (2 * c + 1) / (4 * c * c) * b
        if a.qk_norm and not half:
            core += qkv
    return norms + squares + rows * (head_norms + turns + feed_forward + core)


def ends_bytes(layout: Layout, rows: int, hidden: int, pipeline: int, *, dtype: str, attention: Attention) -> float:
    """What a micro-batch keeps beside its layers: b S h received from the stage before and b S h sent to the one
    behind, on the last stage the final norm."""
    b, size = ITEMSIZE[dtype], scattered_rows(layout, rows) * hidden
    slow = attention == "torch"
    last = pipeline == layout.pipeline - 1
    norm = (2 * b if attention == "transformer_engine" else 12 if slow and b == FP32 else 8) if last else 0
    # the first norm of an fp32 layer on a CPU looks at what was received itself, and that is counted there
    received = b if pipeline > 0 and not (slow and b == FP32) else 0
    sent = b if not last else 0
    return size * (norm + received + sent)


def chunks_in_flight(layout: Layout, pipeline: int, count: int) -> int:
    """Micro-batches, of a chunk each, whose activations stage `pipeline` keeps at once under megatron's schedules:

    1F1B min(count, p - stage)     interleaved min(count v, 2 (p - stage - 1) + (v - 1) p + 1)
    """
    p, v = layout.pipeline, layout.virtual_pipeline
    if v == 1:
        return min(count, p - pipeline)
    return min(count * v, 2 * (p - pipeline - 1) + (v - 1) * p + 1)
