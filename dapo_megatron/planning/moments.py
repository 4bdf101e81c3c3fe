"""The moments of an update at which most is alive on a rank, beside weights, gradients and optimizer.

Letters as in activations.py; V vocabulary rows, padded; w bytes a number of a weight's gradient before it joins the
fp32 buffer: b, on a CPU in bf16 6, for torch widens it there first.
"""

from dataclasses import dataclass

from dapo_megatron.config import Architecture, Layout, Recipe
from dapo_megatron.planning.activations import (
    Attention,
    attention_of,
    chunks_in_flight,
    ends_bytes,
    kept_bytes,
    micro_batch_rows,
    scattered_rows,
    spec_of,
)
from dapo_megatron.planning.engine import longest_sequence
from dapo_megatron.planning.weights import FP32, ITEMSIZE, StateBytes, chunk_parameters

CHUNK_ROWS = 2048  # rows of logits alive at a time where the output layer is fused into the loss
LOSS_BYTES = 3 << 20  # pieces of logits in fp32 that the torch loss works on at a time, on a CPU


@dataclass(frozen=True)
class ComputeBytes:
    """What one stage holds beside its state when most is alive. activations: kept for the backward pass, with what the
    layer at work makes; logits: what output layer and loss make, 0 where most is alive at another moment; update: what
    a reduction or the optimizer makes, likewise."""

    activations: int
    logits: int
    update: int = 0

    @property
    def total(self) -> int:
        return self.activations + self.logits + self.update


def compute_bytes(
    recipe: Recipe,
    a: Architecture,
    layout: Layout,
    pipeline: int,
    count: int,
    *,
    attention: Attention | None = None,
    state: StateBytes | None = None,
) -> ComputeBytes:
    """The fullest moment of stage `pipeline` in a mini-batch of `count` micro-batches with the whole token budget each:

        output layer   everything kept, and logits with what their gradient makes (last stage)
        a layer        everything kept, and what the layer at work makes
        embedding      the gradient of its weight, and what other micro-batches keep (first stage)
        reduction      on a CPU with `optimizer.distributed`: gloo's copy of the gradients
        optimizer      on a CPU: a root and a quotient in fp32 of the largest parameter, or of the rank's part of it

    With learner.recompute=full a layer keeps its input alone, b S h, and the layer at work everything. `attention`:
    None takes the recipe's. `state`: of the stage; None leaves out the reduction and takes whole parameters.
    """
    attention = attention_of(recipe) if attention is None else attention
    dtype, slow = recipe.model.dtype, attention == "torch"
    b, rows = ITEMSIZE[dtype], micro_batch_rows(recipe, layout)
    again = recipe.learner.recompute
    layer = kept_bytes(
        a, layout, rows, dtype=dtype, attention=attention, length=longest_sequence(recipe), again=again == "selective"
    )
    entry = b * scattered_rows(layout, rows) * a.hidden
    flight = chunks_in_flight(layout, pipeline, count)
    layers, at_work = flight * layout.layers_per_chunk, 0.0
    ends = flight * ends_bytes(layout, rows, a.hidden, pipeline, dtype=dtype, attention=attention)
    kept = layers * layer + ends
    if again == "full":
        # the norm of an fp32 layer on a CPU looks at the layer's input itself
        kept, at_work = layers * entry + ends, layer - (entry if slow and b == FP32 else 0)
    first, last = pipeline == 0, pipeline == layout.pipeline - 1
    table = a.hidden * layout.padded_vocab / layout.tensor
    # a tied output layer's gradient waits for the embedding's
    waiting = b * table if a.tied and layout.pipeline == 1 and not a.value_head else 0.0
    working = at_work + _layer_bytes(a, layout, rows, dtype=dtype, attention=attention)
    moments = [ComputeBytes(round(kept + working + waiting), 0)]
    if last:
        moments.append(ComputeBytes(round(kept), round(head_bytes(recipe, a, layout, rows, attention=attention))))
    if first:
        others = kept * (flight - 1) / flight
        joined = weight_gradient_item(dtype, attention) * table + waiting
        moments.append(ComputeBytes(round(others + joined + entry), 0))
    if slow:
        stages = [v * layout.pipeline + pipeline for v in range(layout.virtual_pipeline)]
        largest = max(p.elements for stage in stages for p in chunk_parameters(a, layout, stage, spec_of(attention)))
        if state is not None:
            largest = min(largest, state.optimizer // ((3 if b < FP32 else 2) * FP32))  # a main weight, two moments
        moments.append(ComputeBytes(0, 0, 2 * FP32 * largest))
        if state is not None and recipe.optimizer.distributed:
            moments.append(ComputeBytes(0, 0, state.gradients // layout.virtual_pipeline))
    return max(moments, key=lambda moment: moment.total)


def weight_gradient_item(dtype: str, attention: Attention) -> int:
    """w: bytes of an element of a weight's gradient, with the copy that joins the fp32 buffer."""
    b = ITEMSIZE[dtype]
    return b + FP32 if attention == "torch" and b < FP32 else b


def _layer_bytes(a: Architecture, layout: Layout, rows: int, *, dtype: str, attention: Attention) -> float:
    """What the backward pass of a layer makes anew, before it gives back what the layer kept: the most of

    silu         T b (2 f / t + h)                      gradients of silu(gate), up and the residual
    fc2          T b (f / t + h) + w f h / t            gradient of the product, and the weight's
    fc1          w 2 f h / t - 3 T b f / t + 2 T b h    the weight's gradient, when most of the layer's ffn is gone
    norm         20 S h                                 on a CPU, whose norm is not one kernel: five in fp32

    and T b h gathered under sequence parallelism. TransformerEngine: T b (3 f / t + 2 h) + b 2 f h / t. Under context
    parallelism on a GPU also 4 c T k b / t: keys and values of the whole pack, and their gradients.
    """
    b, w, t = ITEMSIZE[dtype], weight_gradient_item(dtype, attention), layout.tensor
    ffn, hidden = a.ffn / t, a.hidden
    gathered = rows * b * hidden if layout.sequence_parallel else 0
    if attention == "torch":
        silu = rows * b * (2 * ffn + hidden)
        fc2 = rows * b * (ffn + hidden) + w * ffn * hidden + gathered
        fc1 = w * 2 * ffn * hidden - 3 * rows * b * ffn + 2 * rows * b * hidden + gathered
        return max(silu, fc2, fc1, 20 * scattered_rows(layout, rows) * hidden)
    keys = a.kv_heads * a.head_dim / t
    whole = 4 * layout.context * rows * keys * b if layout.context > 1 else 0
    return rows * b * (3 * ffn + 2 * hidden) + b * 2 * ffn * hidden + whole


def head_bytes(recipe: Recipe, a: Architecture, layout: Layout, rows: int, *, attention: Attention) -> float:
    """What output layer and loss make: gathered hidden states and their gradient, 2 T h b, of which the former are kept
    as they are without sequence parallelism; and

    whole    T V / t x b + w h V / t             logits, which their gradient overwrites; the weight's gradient
    fused    n (V / t + h) x b                   a chunk of n = 2048 rows of logits and hidden states; the weight's
                                                 gradient goes to the fp32 buffer at once, on a CPU in bf16 from a
                                                 chunk in fp32, 3 times as much
    """
    b, vocabulary = ITEMSIZE[recipe.model.dtype], layout.padded_vocab / layout.tensor
    hidden = rows * a.hidden * b * (2 if layout.sequence_parallel else 1)
    if layout.sequence_parallel:
        hidden += rows * a.hidden * b / layout.tensor
    w = weight_gradient_item(recipe.model.dtype, attention)
    if a.value_head:
        return FP32 * rows * a.hidden * 2
    if recipe.learner.fused_linear_loss:
        chunk = min(rows, CHUNK_ROWS) * (vocabulary + a.hidden)
        loss = LOSS_BYTES if attention == "torch" else 0
        return hidden + max(chunk * w, chunk * b + loss)
    waits = a.tied and layout.pipeline == 1  # the weight's gradient, for the embedding's
    made = hidden + a.hidden * vocabulary * (b if waits else w)
    return rows * vocabulary * b + max(made, LOSS_BYTES if attention == "torch" else 0)
