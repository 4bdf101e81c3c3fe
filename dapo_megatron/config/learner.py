"""Section `learner`: how the learner computes; none of it changes what is learnt."""

from typing import Literal

from pydantic import Field

from dapo_megatron.config.section import Section


class Learner(Section):
    """Micro-batches, recomputation and the device."""

    tokens_per_micro_batch: int = Field(22528, ge=1)
    """Token budget of a packed micro-batch (tokens); at least one prompt with its response must fit."""

    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none, those of attention, or all of a layer."""

    loss_kernel: Literal["auto", "triton", "torch"] = "auto"
    """What computes log-probs, entropy and loss: auto = triton on a GPU, torch elsewhere."""

    fused_linear_loss: bool = False
    """Fuse the output layer's product into the loss, a chunk of rows at a time: the logits are never whole."""

    offload_optimizer: bool = False
    """Keep optimizer state and gradient buffers in host memory while no update is made, a critic's too: room for
    engines on the learner's own GPUs, for a copy both ways a step."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = cuda where there is a GPU, else cpu."""

    threads: int = Field(1, ge=1)
    """CPU threads a rank."""

    time_limit_s: float = Field(600.0, gt=0)
    """Longest wait in any collective (seconds)."""
