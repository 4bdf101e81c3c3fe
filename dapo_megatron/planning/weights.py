"""Parameters, gradients and optimizer state of a rank, to the byte: the sizes of megatron-core's buffers.

Source: megatron-core 0.16.1, distributed/param_and_grad_buffer.py, optimizer/distrib_optimizer.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dapo_megatron.config import Architecture, Layout
from dapo_megatron.config.derive import round_up

LayerSpec = Literal["local", "transformer_engine"]

ITEMSIZE = {"bf16": 2, "fp32": 4}
FP32 = 4
PARAMETER_ALIGNMENT = 64  # elements; of a parameter's start, with the distributed optimizer
BUCKET_ALIGNMENT = 128  # elements; a bucket's end is a multiple of this and of the data-parallel size


@dataclass(frozen=True)
class Parameter:
    """One parameter of a chunk on one rank. `shared`: a tied embedding under pipeline parallelism."""

    name: str
    shape: tuple[int, ...]
    shared: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Buffer:
    """One chunk's parameters laid end to end; `buckets` and `spans` (of each parameter) are (start, stop) elements."""

    elements: int  # padding included
    buckets: tuple[tuple[int, int], ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class StateBytes:
    """What a model keeps on a rank from beginning to end (bytes)."""

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def chunk_parameters(a: Architecture, layout: Layout, stage: int, spec: LayerSpec) -> list[Parameter]:
    """The parameters of model chunk `stage` (of pipeline x virtual_pipeline) on each of its tensor-parallel ranks, in
    the order in which megatron's modules register them; TransformerEngine's linears hold the norm in front of them.

    Linear weights are cut by the tensor-parallel size t: qkv [(heads + 2 kv heads) d / t, h], proj [h, heads d / t],
    fc1 [2 ffn / t, h], fc2 [h, ffn / t]; embedding and output rows [padded vocabulary / t, h]; norms are whole.
    """
    t, last = layout.tensor, layout.pipeline * layout.virtual_pipeline - 1
    queries, h = a.heads * a.head_dim, a.hidden
    qkv = (queries + 2 * a.kv_heads * a.head_dim) // t
    vocabulary = (layout.padded_vocab // t, h)
    copied = a.tied and layout.pipeline > 1
    fused = spec == "transformer_engine"
    found = [Parameter("embedding.word_embeddings.weight", vocabulary, copied)] if stage == 0 else []
    for i in range(layout.layers_per_chunk):
        layer = f"decoder.layers.{i}."
        attention = layer + "self_attention."
        if not fused:
            found.append(Parameter(layer + "input_layernorm.weight", (h,)))
        found.append(Parameter(attention + "linear_proj.weight", (h, queries // t)))
        if fused:
            found.append(Parameter(attention + "linear_qkv.layer_norm_weight", (h,)))
        found.append(Parameter(attention + "linear_qkv.weight", (qkv, h)))
        if a.qkv_bias:
            found.append(Parameter(attention + "linear_qkv.bias", (qkv,)))
        if a.qk_norm:
            found.append(Parameter(attention + "q_layernorm.weight", (a.head_dim,)))
            found.append(Parameter(attention + "k_layernorm.weight", (a.head_dim,)))
        mlp_norm = "mlp.linear_fc1.layer_norm_weight" if fused else "pre_mlp_layernorm.weight"
        found.append(Parameter(layer + mlp_norm, (h,)))
        found.append(Parameter(layer + "mlp.linear_fc1.weight", (2 * a.ffn // t, h)))
        found.append(Parameter(layer + "mlp.linear_fc2.weight", (h, a.ffn // t)))
    if stage == last:
        found.append(Parameter("decoder.final_layernorm.weight", (h,)))
        if a.value_head:
            found += [Parameter("output_layer.weight", (1, h)), Parameter("output_layer.bias", (1,))]
        elif not a.tied or last > 0:
            found.append(Parameter("output_layer.weight", vocabulary, copied))
    return found


def buffer_of(parameters: Sequence[Parameter], *, data_parallel: int, distributed: bool) -> Buffer:
    """How megatron lays the parameters into a buffer: backwards, shared ones in a bucket of their own.

    `distributed`: with its distributed optimizer, which aligns parameters to 64 elements and buckets to
    lcm(data-parallel size, 128).
    """
    buckets: list[tuple[int, int]] = []
    spans: list[tuple[int, int]] = []
    start = opened = 0

    def close(stop: int) -> int:
        stop = round_up(stop, math.lcm(data_parallel, BUCKET_ALIGNMENT)) if distributed else stop
        buckets.append((opened, stop))
        return stop

    for parameter in reversed(parameters):
        start = round_up(start, PARAMETER_ALIGNMENT) if distributed else start
        alone = parameter.shared and distributed
        if alone and start > opened:
            start = opened = close(start)
        spans.append((start, start + parameter.elements))
        start += parameter.elements
        if alone:
            start = opened = close(start)
    if start > opened:
        start = close(start)
    return Buffer(start, tuple(buckets), tuple(spans))


def shard_elements(buffer: Buffer, data_parallel: int) -> list[int]:
    """Elements whose optimizer state lies on each data-parallel rank: its equal part of every bucket, less padding."""
    gaps = _gaps(buffer)
    found = [0] * data_parallel
    for start, stop in buffer.buckets:
        part = (stop - start) // data_parallel
        for rank in range(data_parallel):
            low, high = start + rank * part, start + (rank + 1) * part
            padding = sum(max(0, min(high, b) - max(low, a)) for a, b in gaps)
            found[rank] += part - padding
    return found


def state_bytes(
    a: Architecture, layout: Layout, pipeline: int, *, dtype: str, distributed: bool, spec: LayerSpec
) -> tuple[StateBytes, list[int]]:
    """(bytes of the fullest rank, optimizer bytes of each that shares the state) on pipeline stage `pipeline`: data x
    context ranks hold the same weights.

    parameters   itemsize x elements             with the distributed optimizer padding included
    gradients    4 x elements                    fp32, likewise
    optimizer    12 x own elements in bf16       fp32 main parameter and two fp32 moments;
                 8 x own elements in fp32        the moments alone
    """
    itemsize = ITEMSIZE[dtype]
    each = (3 if itemsize < FP32 else 2) * FP32
    parameters = gradients = 0
    sharers = layout.data * layout.context
    optimizer = [0] * sharers
    for v in range(layout.virtual_pipeline):
        chunk = chunk_parameters(a, layout, v * layout.pipeline + pipeline, spec)
        buffer = buffer_of(chunk, data_parallel=sharers, distributed=distributed)
        parameters += itemsize * buffer.elements
        gradients += FP32 * buffer.elements
        shards = shard_elements(buffer, sharers) if distributed else [buffer.elements] * sharers
        optimizer = [total + each * own for total, own in zip(optimizer, shards, strict=True)]
    return StateBytes(parameters, gradients, max(optimizer)), optimizer


def model_parameters(a: Architecture) -> int:
    """Weights of all products a token passes: everything but embedding and norms; with an output layer, also tied."""
    d = a.head_dim
    layer = a.hidden * (2 * a.heads + 2 * a.kv_heads) * d + 3 * a.hidden * a.ffn
    return a.layers * layer + (a.hidden if a.value_head else a.vocab * a.hidden)


def _gaps(buffer: Buffer) -> list[tuple[int, int]]:
    gaps, reached = [], 0
    for start, stop in buffer.spans:
        if start > reached:
            gaps.append((reached, start))
        reached = stop
    if buffer.elements > reached:
        gaps.append((reached, buffer.elements))
    return gaps
