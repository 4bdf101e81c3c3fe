"""Bytes that a learner rank needs while it computes a mini-batch, beside its weights and optimizer.

Letters: T rows of a micro-batch on a rank (the token budget / c), S = T / t under sequence parallelism, else T;
t tensor- and c context-parallel size; h hidden, f ffn, q = heads x head size, k = kv heads x head size; b bytes a
number (bf16 2).
"""

from dataclasses import dataclass

from dapo_megatron.config import Architecture, Layout, Recipe
from dapo_megatron.planning.weights import FP32, ITEMSIZE, LayerSpec, chunk_parameters

CHUNK_ROWS = 2048  # rows of logits alive at a time where the output layer is fused into the loss


@dataclass(frozen=True)
class ComputeBytes:
    """Peak of one stage: activations kept for the backward pass with what the layer at work needs; logits."""

    activations: int
    logits: int


def layer_spec_of(recipe: Recipe) -> LayerSpec:
    """The layers that plans count with: on GPUs `auto` means TransformerEngine, which belongs to such a machine."""
    if recipe.model.layer_spec == "local" or recipe.learner.device == "cpu":
        return "local"
    return "transformer_engine"


def kept_bytes(a: Architecture, layout: Layout, rows: int, *, dtype: str, spec: LayerSpec) -> float:
    """What one layer keeps for its backward pass without recomputation.

    norms        2 S h x (local 8, TransformerEngine 2 b)     input, in fp32 where local; normalised; output
    q, k norms   T (q + k) / t x (local 6 in bf16 and 4 in fp32, TransformerEngine b)
    attention    T (b (3 q + 3 k) + 4 heads) / t              qkv, turned q and k, output, log-sums
    feed-forward T f / t x (local 4 b, TransformerEngine 3 b) gate and up, product, and where local silu(gate)
    """
    b, local = ITEMSIZE[dtype], spec == "local"
    queries, keys = a.heads * a.head_dim, a.kv_heads * a.head_dim
    norms = 2 * scattered_rows(layout, rows) * a.hidden * (8 if local else 2 * b)
    head_norms = (queries + keys) * ((6 if b < FP32 else 4) if local else b) if a.qk_norm else 0
    attention = b * 3 * (queries + keys) + FP32 * a.heads
    feed_forward = a.ffn * b * (4 if local else 3)
    return norms + rows * (head_norms + attention + feed_forward) / layout.tensor


def working_bytes(a: Architecture, layout: Layout, rows: int, *, dtype: str, largest: int) -> float:
    """What the backward pass of a layer makes anew: T b (3 f / t + 2 h) for gradients of the feed-forward layer and
    gathered rows, and the gradient of the `largest` weight (elements) before it is added to the fp32 buffer. Under
    context parallelism also 4 c T k b / t: keys and values of the whole pack, and their gradients."""
    b, keys = ITEMSIZE[dtype], a.kv_heads * a.head_dim / layout.tensor
    gathered = 4 * layout.context * rows * keys * b if layout.context > 1 else 0
    return rows * b * (3 * a.ffn / layout.tensor + 2 * a.hidden) + b * largest + gathered


def chunks_in_flight(layout: Layout, pipeline: int, count: int) -> int:
    """Micro-batches, of a chunk each, whose activations stage `pipeline` keeps at once under megatron's schedules:

    1F1B min(count, p - stage)     interleaved min(count v, 2 (p - stage - 1) + (v - 1) p + 1)
    """
    p, v = layout.pipeline, layout.virtual_pipeline
    if v == 1:
        return min(count, p - pipeline)
    return min(count * v, 2 * (p - pipeline - 1) + (v - 1) * p + 1)


def compute_bytes(recipe: Recipe, a: Architecture, layout: Layout, pipeline: int, count: int) -> ComputeBytes:
    """Peak bytes of stage `pipeline` in a mini-batch of `count` micro-batches with the whole token budget each.

    With learner.recompute=full a layer keeps its input alone, b S h, and the layer at work everything. `selective`
    keeps what `none` does: flash attention leaves little to recompute.
    """
    dtype, spec = recipe.model.dtype, layer_spec_of(recipe)
    b, t = ITEMSIZE[dtype], layout.tensor
    rows = -(-recipe.learner.tokens_per_micro_batch // (t * layout.context)) * t
    scattered = scattered_rows(layout, rows)
    kept = kept_bytes(a, layout, rows, dtype=dtype, spec=spec)
    last = pipeline == layout.pipeline - 1
    stages = [v * layout.pipeline + pipeline for v in range(layout.virtual_pipeline)]
    largest = max(p.elements for stage in stages for p in chunk_parameters(a, layout, stage, spec))
    flight = chunks_in_flight(layout, pipeline, count)
    layers = flight * layout.layers_per_chunk
    full = recipe.learner.recompute == "full"
    activations = layers * b * scattered * a.hidden + kept if full else layers * kept
    activations += working_bytes(a, layout, rows, dtype=dtype, largest=largest)
    if layout.pipeline > 1:  # what came from the stage before and went to the one behind
        activations += 2 * flight * b * scattered * a.hidden
    return ComputeBytes(round(activations), round(_head_bytes(recipe, a, layout, rows)) if last else 0)


def scattered_rows(layout: Layout, rows: int) -> float:
    """S: rows of residuals and norms on a rank."""
    return rows / layout.tensor if layout.sequence_parallel else rows


def _head_bytes(recipe: Recipe, a: Architecture, layout: Layout, rows: int) -> float:
    """Gathered hidden states and their gradient, 2 T h b, and

    whole    T V / t x b                         logits, which their gradient overwrites
    fused    2048 V / t x b + 4 h V / t          a chunk of them, and the weight's gradient in fp32
    """
    b, vocabulary = ITEMSIZE[recipe.model.dtype], layout.padded_vocab / layout.tensor
    hidden = 2 * rows * a.hidden * b
    if a.value_head:
        return hidden
    if recipe.learner.fused_linear_loss:
        return hidden + min(rows, CHUNK_ROWS) * vocabulary * b + FP32 * a.hidden * vocabulary
    return hidden + rows * vocabulary * b
