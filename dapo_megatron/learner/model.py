"""A Hugging Face `config.json` → this rank's chunks of a megatron-core GPTModel, without weights; of a critic with a
value head in its output layer's place."""

import torch
from torch import nn

from dapo_megatron.config import Architecture, Layout
from dapo_megatron.errors import RequestError
from dapo_megatron.learner import megatron_cpu

megatron_cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.tensor_parallel import (  # noqa: E402
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.identity_op import IdentityOp  # noqa: E402
from megatron.core.transformer.spec_utils import ModuleSpec  # noqa: E402
from megatron.core.transformer.transformer_block import (  # noqa: E402
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from dapo_megatron.learner.attention import PackedCausalAttention, RMSNorm  # noqa: E402
from dapo_megatron.learner.value_head import ValueHead  # noqa: E402

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def choose_layer_spec(setting: str, device: torch.device) -> str:
    """model.layer_spec → "transformer_engine" or "local".

    Raises:
        RequestError: TransformerEngine is asked for and absent.
    """
    usable = HAVE_TE and device.type == "cuda"
    if setting == "transformer_engine" and not usable:
        raise RequestError("model.layer_spec=transformer_engine needs TransformerEngine and a GPU; use auto or local")
    return "transformer_engine" if usable and setting != "local" else "local"


def transformer_config(
    architecture: Architecture, layout: Layout, *, dtype: torch.dtype, layer_spec: str, recompute: str = "none"
) -> TransformerConfig:
    """megatron's TransformerConfig of the architecture under the layout.

    `calculate_per_token_loss` keeps megatron from dividing the loss: the one denominator is the mini-batch's own.
    """
    recomputation = {
        "none": {},
        "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    }[recompute]
    return TransformerConfig(
        num_layers=architecture.layers,
        hidden_size=architecture.hidden,
        num_attention_heads=architecture.heads,
        num_query_groups=architecture.kv_heads,
        kv_channels=architecture.head_dim,
        ffn_hidden_size=architecture.ffn,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.rms_eps,
        qk_layernorm=architecture.qk_norm,
        add_bias_linear=False,
        add_qkv_bias=architecture.qkv_bias,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        sequence_parallel=layout.sequence_parallel,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=layer_spec == "transformer_engine",
        bias_activation_fusion=layer_spec == "transformer_engine",
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        perform_initialization=False,  # every element comes from a checkpoint
        use_cpu_initialization=not torch.cuda.is_available(),
        batch_p2p_comm=layout.virtual_pipeline == 1,  # batched, two interleaved stages would swap forward and backward
        overlap_p2p_comm=False,
        **recomputation,
    )


def block_spec(
    config: TransformerConfig, layer_spec: str, vp_stage: int | None
) -> ModuleSpec | TransformerBlockSubmodules:
    """The modules of this chunk's layers: TransformerEngine's, or megatron's linears with our norm and attention."""
    if layer_spec == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedCausalAttention
    attention.q_layernorm = attention.k_layernorm = RMSNorm if config.qk_layernorm else IdentityOp
    count = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)


def build_chunks(
    config: TransformerConfig, architecture: Architecture, layout: Layout, *, layer_spec: str
) -> list[nn.Module]:
    """This rank's model chunks (one, or `virtual_pipeline` of them), on the current device, weights not yet set."""
    chunks = []
    for stage in range(layout.virtual_pipeline):
        vp_stage = stage if layout.virtual_pipeline > 1 else None
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage)
        chunk = GPTModel(
            config=config,
            transformer_layer_spec=block_spec(config, layer_spec, vp_stage),
            vocab_size=layout.padded_vocab,
            max_sequence_length=architecture.max_positions,
            pre_process=first,
            post_process=last,
            parallel_output=True,
            share_embeddings_and_output_weights=architecture.tied,
            position_embedding_type="rope",
            rotary_base=architecture.rope_theta,
            rope_scaling=architecture.rope_scaling is not None,
            rope_scaling_factor=(architecture.rope_scaling or {}).get("factor", 1.0),
            vp_stage=vp_stage,
        )
        if last and architecture.value_head:
            chunk.output_layer = ValueHead(config)
        _mark_shards(chunk)
        chunks.append(chunk if not torch.cuda.is_available() else chunk.cuda(torch.cuda.current_device()))
    return chunks


def _mark_shards(chunk: nn.Module) -> None:
    """Mark which weights are shards of a tensor-parallel whole.

    megatron does so only while initialising them; without the mark the gradient norm, and with it clipping, leaves out
    all shards but the first rank's.
    """
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            weight = module.weight
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                dimension = 1 if isinstance(module, RowParallelLinear) else 0
                set_tensor_model_parallel_attributes(weight, True, dimension, 1)
