"""Random models and layouts, and what each Megatron rank of them must hold, built the way Megatron cuts whole tensors.

Every canonical element is a number of its own: a shard's content tells where it came from. Padding is -1.
"""

import math
from itertools import count

import torch
from hypothesis import strategies as st
from torch import Tensor

from dapo_megatron.config import Architecture, Layout
from dapo_megatron.resharding.hf_layout import canonical_tensors
from dapo_megatron.resharding.messages import Message
from dapo_megatron.resharding.plan import Plan

PADDING = -1


def architecture(family: str = "qwen2", **changes: object) -> Architecture:
    """A small model; `changes` replace its sizes."""
    sizes = {
        "layers": 4, "hidden": 6, "heads": 4, "kv_heads": 2, "head_dim": 4, "ffn": 8, "vocab": 100, "tied": False,
        **changes,
    }  # fmt: skip
    return Architecture(
        family=family, qkv_bias=family == "qwen2", qk_norm=family == "qwen3", rms_eps=1e-6, rope_theta=1e4,
        rope_scaling=None, max_positions=128, sliding_window=None, eos_token_ids=(1,), init_std=0.02,
        torch_dtype="float32", **sizes,
    )  # fmt: skip


def layout_for(a: Architecture, tensor: int = 1, pipeline: int = 1, virtual: int = 1, data: int = 1) -> Layout:
    """The Layout of a world of tensor x pipeline x data ranks."""
    multiple = math.lcm(tensor, 64)
    return Layout(
        world=tensor * pipeline * data, tensor=tensor, pipeline=pipeline, virtual_pipeline=virtual, context=1,
        data=data, sequence_parallel=False, layers_per_chunk=a.layers // (pipeline * virtual), mini_batch_prompts=1,
        updates_per_step=1, responses_per_step=1, padded_vocab=-(-a.vocab // multiple) * multiple,
    )  # fmt: skip


def tensor_sizes(a: Architecture, most: int = 8) -> list[int]:
    """Tensor-parallel sizes that Megatron accepts: they divide heads, ffn and qkv rows, and fit the kv heads."""
    qkv = (a.heads + 2 * a.kv_heads) * a.head_dim
    return [
        n
        for n in range(1, most + 1)
        if not (a.heads % n or a.ffn % n or qkv % n) and (a.kv_heads % n == 0 or n % a.kv_heads == 0)
    ]


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    """qwen2, llama and qwen3, tied or not, with any ratio of heads to kv heads."""
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 8]))
    return architecture(
        draw(st.sampled_from(["qwen2", "llama", "qwen3"])),
        layers=draw(st.sampled_from([1, 2, 4, 6])),
        hidden=draw(st.integers(1, 5)),
        heads=kv_heads * draw(st.sampled_from([1, 2, 3, 4, 5])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 4, 6])),
        ffn=draw(st.sampled_from([8, 24])),
        vocab=draw(st.sampled_from([3, 63, 64, 65, 130])),
        tied=draw(st.booleans()),
    )


@st.composite
def layouts(draw: st.DrawFn, a: Architecture, world: int | None = None) -> Layout:
    """A layout of `a`; with `world`, of exactly that many ranks."""
    choices = [
        (tensor, pipeline, virtual, data)
        for tensor in tensor_sizes(a)
        for pipeline in (1, 2, 3, 4)
        for virtual in (1, 2, 3)
        for data in ((1, 2) if world is None else (world // (tensor * pipeline),))
        if a.layers % (pipeline * virtual) == 0
        and (virtual == 1 or pipeline > 1)
        and (world is None or tensor * pipeline * data == world)
    ]
    return layout_for(a, *draw(st.sampled_from(choices)))


def numbered(a: Architecture) -> dict[str, Tensor]:
    """Canonical tensors, int64, in which no number occurs twice."""
    found, first = {}, 0
    for name, shape in canonical_tensors(a).items():
        size = math.prod(shape)
        found[name] = torch.arange(first, first + size).reshape(shape)
        first += size
    return found


def shards(
    a: Architecture, layout: Layout, whole: dict[str, Tensor], layer_spec: str = "local"
) -> dict[int, dict[str, Tensor]]:
    """rank → its local tensors by key, cut from whole Megatron tensors."""
    ranks: dict[int, dict[str, Tensor]] = {}
    # megatron's rank order: tensor innermost, then data, then pipeline
    number = count()
    for pipeline in range(layout.pipeline):
        for _ in range(layout.data):
            for tensor in range(layout.tensor):
                ranks[next(number)] = _rank(a, layout, whole, tensor, pipeline, layer_spec)
    return ranks


def _rank(a: Architecture, layout: Layout, whole: dict[str, Tensor], tensor: int, pipeline: int, layer_spec: str):
    cut = lambda x, dim=0: x.chunk(layout.tensor, dim)[tensor].clone()  # noqa: E731
    te = layer_spec == "transformer_engine"
    local: dict[str, Tensor] = {}
    chunks = layout.pipeline * layout.virtual_pipeline
    for v in range(layout.virtual_pipeline):
        stage = v * layout.pipeline + pipeline
        if stage == 0:
            local[f"chunk{v}.embedding.word_embeddings.weight"] = cut(
                _padded(a, layout, whole["model.embed_tokens.weight"])
            )
        for i in range(layout.layers_per_chunk):
            hf = f"model.layers.{stage * layout.layers_per_chunk + i}."
            mine = f"chunk{v}.decoder.layers.{i}."
            attention = hf + "self_attn."
            for kind in ("weight", "bias") if a.qkv_bias else ("weight",):
                by_group = [
                    whole[f"{attention}{letter}_proj.{kind}"].reshape(
                        a.kv_heads, -1, *((a.hidden,) * (kind == "weight"))
                    )
                    for letter in "qkv"
                ]
                local[f"{mine}self_attention.linear_qkv.{kind}"] = cut(torch.cat(by_group, dim=1).flatten(0, 1))
            if a.qk_norm:
                for letter in "qk":
                    local[f"{mine}self_attention.{letter}_layernorm.weight"] = whole[
                        f"{attention}{letter}_norm.weight"
                    ].clone()
            local[mine + "self_attention.linear_proj.weight"] = cut(whole[attention + "o_proj.weight"], 1)
            halves = [cut(whole[f"{hf}mlp.{half}_proj.weight"]) for half in ("gate", "up")]
            local[mine + "mlp.linear_fc1.weight"] = torch.cat(halves)
            local[mine + "mlp.linear_fc2.weight"] = cut(whole[hf + "mlp.down_proj.weight"], 1)
            norms = ("self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight")
            if not te:
                norms = ("input_layernorm.weight", "pre_mlp_layernorm.weight")
            for key, name in zip(norms, ("input_layernorm", "post_attention_layernorm"), strict=True):
                local[mine + key] = whole[f"{hf}{name}.weight"].clone()
        if stage == chunks - 1:
            local[f"chunk{v}.decoder.final_layernorm.weight"] = whole["model.norm.weight"].clone()
            output = "model.embed_tokens.weight" if a.tied else "lm_head.weight"
            if not a.tied or chunks > 1:
                local[f"chunk{v}.output_layer.weight"] = cut(_padded(a, layout, whole[output]))
    return local


def _padded(a: Architecture, layout: Layout, rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.full((layout.padded_vocab - a.vocab, a.hidden), PADDING)])


def vllm_sizes(a: Architecture, most: int = 8) -> list[int]:
    """Tensor-parallel sizes that vLLM accepts."""
    rows = -(-a.vocab // 64) * 64
    return [
        n
        for n in range(1, most + 1)
        if not (a.heads % n or a.ffn % n or rows % n) and (a.kv_heads % n == 0 or n % a.kv_heads == 0)
    ]


def vllm_worker(a: Architecture, whole: dict[str, Tensor], tensor: int, worker: int) -> dict[str, Tensor]:
    """A vLLM worker's tensors by name, cut from whole tensors as vLLM's loaders cut them."""
    cut = lambda x, dim=0: x.chunk(tensor, dim)[worker]  # noqa: E731
    padding = torch.full((-a.vocab % 64, a.hidden), PADDING)
    local: dict[str, Tensor] = {}
    for name, t in whole.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            local[name] = cut(torch.cat([t, padding]))
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            local[name] = cut(t, 1)
        elif "norm" in name:
            local[name] = t
        elif "q_proj" in name:
            k, v = (whole[name.replace("q_proj", f"{letter}_proj")] for letter in "kv")
            times = max(1, tensor // a.kv_heads)
            of_heads = [cut(x.unflatten(0, (a.kv_heads, -1)).repeat_interleave(times, 0)).flatten(0, 1) for x in (k, v)]
            local[name.replace("q_proj", "qkv_proj")] = torch.cat([cut(t), *of_heads])
        elif "gate_proj" in name:
            up = whole[name.replace("gate_proj", "up_proj")]
            local[name.replace("gate_proj", "gate_up_proj")] = torch.cat([cut(t), cut(up)])
    return {name: t.clone() for name, t in local.items()}


def carry_out_messages(
    plan: Plan,
    messages: tuple[Message, ...],
    source: dict[int, dict[str, Tensor]],
    target: dict[int, dict[str, Tensor]],
) -> None:
    """The copies inside a process, then every message as one flat buffer."""
    carry_out(Plan(tuple(m for m in plan.moves if m.source_rank == m.target_rank)), source, target)
    for message in messages:
        parts = [box(source[message.source_rank][m.source_key], m.source_offset, m.shape) for m in message.moves]
        buffer = torch.cat([part.reshape(-1) for part in parts])
        assert buffer.numel() == message.elements
        for m, part in zip(message.moves, buffer.split([m.elements for m in message.moves]), strict=True):
            assert (m.source_rank, m.target_rank) == (message.source_rank, message.target_rank)
            box(target[m.target_rank][m.target_key], m.target_offset, m.shape).copy_(part.view(m.shape))


def box(tensor: Tensor, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """The view of `shape` at `offset`."""
    return tensor[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))]


def carry_out(plan: Plan, source: dict[int, dict[str, Tensor]], target: dict[int, dict[str, Tensor]]) -> None:
    """All moves of a plan, between ranks that are dictionaries of one process."""
    for m in plan.moves:
        part = box(source[m.source_rank][m.source_key], m.source_offset, m.shape)
        box(target[m.target_rank][m.target_key], m.target_offset, m.shape).copy_(part)
