"""Norm and packed causal attention for the layer spec that needs no TransformerEngine.

Attention of a pack costs Σ L_i², never (Σ L_i)²: sequences of like length are padded into one [B, L] call of
scaled_dot_product_attention with `is_causal`. Right padding is never seen by a real token, so no mask is built.
"""

import inspect
from contextlib import suppress
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dapo_megatron.learner.alike import alike
from dapo_megatron.learner.context_parallel import ContextPlan, attend_pieces, gather_keys

HAVE_VARLEN = False
if torch.cuda.is_available():  # elsewhere the import alone would cost a second
    with suppress(ImportError):  # one variable-length flash-attention call, where this torch has it
        from torch.nn.attention.varlen import varlen_attn

        HAVE_VARLEN = True
        # key and value heads that queries share: torch 2.11 takes them as they come, later ones ask for the word
        SHARED_HEADS = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class RMSNorm(torch.nn.RMSNorm):
    """x / sqrt(mean(x²) + eps) · weight, computed in fp32 and rounded once, as Hugging Face does; allows sequence
    parallelism.

    Under sequence parallelism each tensor-parallel rank sees other tokens, so the weight is marked for the gradient sum
    that megatron's finalize_model_grads performs.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device())
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            return super().forward(x)
        normed = F.rms_norm(x.float(), self.normalized_shape, None, self.eps)
        return self.weight * normed.to(x.dtype)


class PackedCausalAttention(MegatronModule):
    """Causal softmax(q kᵀ · scale) v, one sequence at a time; grouped-query heads are shared, not copied.

    Packed ("thd"): q [T, heads, d], k and v [T, kv heads, d] → [T, heads·d]; under context parallelism the rows are
    this rank's, and packed_seq_params has a `context_plan`.
    Unpacked: q [S, B, heads, d], k and v [S, B, kv heads, d] → [S, B, heads·d].
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int, *_: object, softmax_scale: float | None = None, **__: object
    ) -> None:
        super().__init__(config)
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: object = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        if packed_seq_params is None:
            out = _causal(*(x.permute(1, 2, 0, 3) for x in (query, key, value)), self.scale)
            return out.permute(2, 0, 1, 3).flatten(2)
        varlen = query.is_cuda and HAVE_VARLEN and query.dtype in (torch.bfloat16, torch.float16)
        plan: ContextPlan | None = getattr(packed_seq_params, "context_plan", None)
        if plan is not None:
            key, value = gather_keys(key, value, plan)
            if not varlen:
                return attend_pieces(query, key, value, plan, self.scale).flatten(1)
            out = varlen_attn(
                query, key[plan.key_rows], value[plan.key_rows], plan.cu_queries, plan.cu_keys,
                plan.longest_queries, plan.longest_keys, window_size=(-1, 0), scale=self.scale, **SHARED_HEADS,
            )  # fmt: skip
            return out.flatten(1)  # flash attention ends the causal triangle at the last key, where a piece ends too
        cu_seqlens = packed_seq_params.cu_seqlens_q
        if varlen:
            longest = packed_seq_params.max_seqlen_q
            out = varlen_attn(
                query, key, value, cu_seqlens, cu_seqlens, longest, longest,
                window_size=(-1, 0), scale=self.scale, **SHARED_HEADS,
            )  # fmt: skip
            return out.flatten(1)
        return packed_causal_attention(query, key, value, cu_seqlens, self.scale).flatten(1)


def packed_causal_attention(
    query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, cu_seqlens: Tensor, scale: float | None
) -> Tensor:
    """[T, heads, d]: causal attention inside each sequence cu_seqlens[i]:cu_seqlens[i + 1]."""
    out = torch.empty_like(query_THD)
    parts: list[tuple[Tensor, Tensor]] = []
    for rows_BL, inside_BL in _groups(tuple(cu_seqlens.tolist()), query_THD.device):
        q, k, v = (x[rows_BL].transpose(1, 2) for x in (query_THD, key_TKD, value_TKD))
        result_BLHD = _causal(q, k, v, scale).transpose(1, 2)
        parts.append((rows_BL[inside_BL], result_BLHD[inside_BL]))
    order = torch.cat([rows for rows, _ in parts])
    return out.index_copy(0, order, torch.cat([values for _, values in parts]))


@lru_cache(maxsize=8)  # every layer of a micro-batch asks for the same groups
def _groups(cu_seqlens: tuple[int, ...], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Sequences of like length → (rows [B, L], inside [B, L] bool); rows beyond a sequence's end repeat the last."""
    lengths = [b - a for a, b in pairwise(cu_seqlens)]
    result = []
    for members in alike(lengths):
        starts = torch.tensor([cu_seqlens[i] for i in members], device=device)[:, None]
        counts = torch.tensor([lengths[i] for i in members], device=device)[:, None]
        steps = torch.arange(lengths[members[0]], device=device)[None]
        result.append((starts + torch.minimum(steps, counts - 1), steps < counts))
    return result


def _causal(query_BHLD: Tensor, key_BKLD: Tensor, value_BKLD: Tensor, scale: float | None) -> Tensor:
    grouped = query_BHLD.shape[1] != key_BKLD.shape[1]
    return F.scaled_dot_product_attention(
        query_BHLD, key_BKLD, value_BKLD, is_causal=True, scale=scale, enable_gqa=grouped
    )
