"""The other side of tools/bench_learner.py: a transformers model with a torch loss, packed, under the same optimizer.

Sequences lie end to end in one row: positions restart, and attention stays inside a sequence. bf16 weights have fp32
main weights and moments beside them, as ours have.
"""

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import is_flash_attn_2_available

from dapo_megatron.config.optimizer import Optimizer
from dapo_megatron.data.packing import PackedBatch
from dapo_megatron.learner.attention import packed_causal_attention

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:
    varlen_attn = None


def attentions(device: torch.device) -> tuple[str, ...]:
    """transformers' own ("sdpa" with a T × T mask), and the fastest one for packs that can be had here."""
    fastest = "flash_attention_2" if device.type == "cuda" and is_flash_attn_2_available() else "packed"
    return "sdpa", fastest


def packed_attention(
    module: torch.nn.Module,
    query_1HTD: Tensor,
    key_1KTD: Tensor,
    value_1KTD: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    **_: object,
) -> tuple[Tensor, None]:
    """Causal attention inside each sequence for transformers: torch's variable-length flash attention on a GPU, like
    lengths together elsewhere. Returns [1, T, heads, d]."""
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query_1HTD, key_1KTD, value_1KTD))
    if varlen_attn is None or not query.is_cuda or query.dtype == torch.float32:
        return packed_causal_attention(query, key, value, cu_seq_lens_q, scaling)[None], None
    # torch 2.11 takes key and value heads that queries share as they come, later ones ask for the word
    options = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    out = varlen_attn(
        query, key, value, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
        window_size=(-1, 0), scale=scaling, **options,
    )  # fmt: skip
    return out[None], None


AttentionInterface.register("packed", packed_attention)


def torch_policy_loss(logits_TV: Tensor, batch: PackedBatch, denominator: float, clip: dict[str, float]) -> Tensor:
    """The clipped token-level loss as plain torch has it: fp32 log-softmax of every row, no entropy."""
    logp = torch.log_softmax(logits_TV.float(), dim=1).gather(1, batch.targets_T[:, None]).squeeze(1)
    advantages = batch.advantages_T
    ratio = (logp - batch.old_logprobs_T).clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - clip["eps_low"], 1 + clip["eps_high"])
    loss_T = torch.maximum(-ratio * advantages, -clipped * advantages)
    loss_T = torch.where(advantages < 0, loss_T.minimum(-clip["eps_dual"] * advantages), loss_T)
    return torch.where(batch.loss_weights_T > 0, batch.loss_weights_T * loss_T, 0.0).sum() / denominator


class TransformersStep:
    """A model, fp32 main weights and AdamW; `step` is one update.

    Args:
        config: a Qwen2 config.json.
        draw: canonical name and shape → weights.
    """

    def __init__(
        self,
        config: dict,
        draw: Callable[[str, tuple[int, ...]], Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
        attention: str,
        recompute: bool,
        optimizer: Optimizer,
    ) -> None:
        with torch.device(device):
            self.model = Qwen2ForCausalLM._from_config(
                Qwen2Config(**config), attn_implementation=attention, dtype=dtype
            )
        for name, parameter in self.model.named_parameters():
            parameter.data.copy_(draw(name, tuple(parameter.shape)))
        self.model.train()
        if recompute:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.weights = list(self.model.parameters())
        half = dtype is not torch.float32
        self.main = [torch.nn.Parameter(w.detach().float()) for w in self.weights] if half else self.weights
        matrices, vectors = [p for p in self.main if p.dim() > 1], [p for p in self.main if p.dim() == 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": optimizer.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=optimizer.learning_rate,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.epsilon,
            fused=device.type == "cuda",
        )
        self.clip_norm = optimizer.gradient_clip

    def step(self, batch: PackedBatch, denominator: float, clip: dict[str, float]) -> tuple[float, float]:
        """(loss, gradient norm before clipping) of one forward, backward and update."""
        logits = self.model(
            input_ids=batch.tokens_T[None],
            position_ids=batch.positions_T[None],
            use_cache=False,
            cu_seq_lens_q=batch.cu_seqlens,
            cu_seq_lens_k=batch.cu_seqlens,
            max_length_q=batch.longest,
            max_length_k=batch.longest,
        ).logits.squeeze(0)
        loss = torch_policy_loss(logits, batch, denominator, clip)
        del logits
        loss.backward()
        if self.main is not self.weights:
            for main, weight in zip(self.main, self.weights, strict=True):
                main.grad, weight.grad = weight.grad.float(), None
        norm = torch.nn.utils.clip_grad_norm_(self.main, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.main is not self.weights:
            with torch.no_grad():
                torch._foreach_copy_([w.data for w in self.weights], [m.data for m in self.main])
        return float(loss.detach()), float(norm)
