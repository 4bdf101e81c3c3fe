"""The same loss by others: plain torch, torch.compile, and Liger-Kernel where it is installed.

Every peer is handed what ours is: logits or hidden states, row vectors, and the clip settings. Liger knows one
advantage a sequence and wants sequences of one length, [B, L + 1, V] with an unused last row: the batches here have
B sequences of L rows. None but ours returns the entropy; plain torch computes it too.
"""

from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

CLIP = {"eps_low": 0.2, "eps_high": 0.28, "eps_dual": 10.0}
Loss = Callable[..., Tensor]


def has_liger() -> bool:
    """Whether Liger-Kernel can be imported."""
    return find_spec("liger_kernel") is not None


def plain_loss(
    logits: Tensor, targets: Tensor, old: Tensor, advantages: Tensor, weights: Tensor, denominator: float
) -> Tensor:
    """The clipped loss with entropy beside it as a page of plain torch has it: fp32 log-softmax of everything."""
    logp = torch.log_softmax(logits.float(), dim=1)
    entropy = -(logp.detach().exp() * logp.detach()).sum(1)
    ratio = (logp.gather(1, targets[:, None]).squeeze(1) - old).clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - CLIP["eps_low"], 1 + CLIP["eps_high"])
    token_loss = torch.maximum(-ratio * advantages, -clipped * advantages)
    token_loss = torch.where(advantages < 0, token_loss.minimum(-CLIP["eps_dual"] * advantages), token_loss)
    return (weights * token_loss).sum() / denominator + 0.0 * entropy.sum()


def torch_losses(device: torch.device, columns: int) -> dict[str, Loss]:
    """name → `plain_loss`'s function, eager everywhere; compiled on a GPU alone, where it needs no C++ compiler."""
    losses: dict[str, Loss] = {"torch eager": plain_loss}
    if device.type == "cuda":
        losses["torch.compile"] = _compiled(columns)
    return losses


@lru_cache(maxsize=1)
def _compiled(columns: int) -> Loss:
    """Compiled afresh for this V, so that V is a constant in it; from the second N on the compiler leaves N open."""
    torch._dynamo.reset()
    return torch.compile(plain_loss)


def liger_loss(logits_BLV: Tensor, targets: Tensor, old: Tensor, advantages: Tensor, weights: Tensor) -> Tensor:
    """Liger's Triton GRPO loss, in place, token-level (loss type "dapo": divided by the number of trained rows).

    logits_BLV: [B, L + 1, V]; the vectors are ours, [B·L]; weights 0 or 1; advantages equal within a sequence.
    """
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    sequences, length = logits_BLV.shape[0], logits_BLV.shape[1] - 1
    loss, _ = triton_grpo_loss(
        logits_BLV, old.view(sequences, length), None, targets.view(sequences, length),
        advantages.view(sequences, length)[:, 0].contiguous(), weights.view(sequences, length),
        temperature=1.0, beta=0.0, eps_low=CLIP["eps_low"], eps_high=CLIP["eps_high"], delta=CLIP["eps_dual"],
        inplace=True, loss_type="dapo", reduce=True,
    )  # fmt: skip
    return loss


def liger_linear_loss(chunk_size: int, compiled: bool) -> Loss:
    """(hidden [B·L, H], weight, vectors as in `liger_loss`, sequences) → the loss by Liger's fused linear GRPO loss,
    `chunk_size` sequences at a time."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=compiled, use_ref_model=False, chunk_size=chunk_size, epsilon_low=CLIP["eps_low"],
        epsilon_high=CLIP["eps_high"], delta=CLIP["eps_dual"], loss_type="dapo", temperature=1.0,
    )  # fmt: skip

    def loss(
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        old: Tensor,
        advantages: Tensor,
        weights: Tensor,
        sequences: int,
    ) -> Tensor:
        length = hidden.shape[0] // sequences
        by_sequence = lambda vector: vector.view(sequences, length)  # noqa: E731
        value, _ = module(
            hidden.view(sequences, length, -1), weight, by_sequence(targets), by_sequence(weights),
            by_sequence(advantages)[:, 0].contiguous(), old_per_token_logps=by_sequence(old),
        )  # fmt: skip
        return value

    return loss
