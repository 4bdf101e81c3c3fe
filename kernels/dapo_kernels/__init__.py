"""Losses on vocab-parallel logits for reinforcement learning of language models. Depends on torch alone (Triton kernels
optional)."""

from dapo_kernels.logprobs import LogprobsAndEntropy, logprobs_and_entropy
from dapo_kernels.policy_loss import PolicyLoss, clipped_policy_loss

__all__ = ["LogprobsAndEntropy", "PolicyLoss", "clipped_policy_loss", "logprobs_and_entropy"]
