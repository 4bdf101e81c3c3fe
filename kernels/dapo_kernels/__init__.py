"""Losses on vocab-parallel logits for reinforcement learning of language models. Depends on torch, and on triton where
its kernels run."""

from dapo_kernels.arguments import choose_implementation
from dapo_kernels.device_errors import DeviceErrors, NonFiniteLogits, device_errors
from dapo_kernels.kl import KLEstimator, kl_estimate
from dapo_kernels.linear import linear_clipped_policy_loss, linear_logprobs_and_entropy
from dapo_kernels.logprobs import LogprobsAndEntropy, logprobs_and_entropy
from dapo_kernels.policy_loss import PolicyLoss, clipped_policy_loss

__all__ = [
    "DeviceErrors",
    "KLEstimator",
    "LogprobsAndEntropy",
    "NonFiniteLogits",
    "PolicyLoss",
    "choose_implementation",
    "clipped_policy_loss",
    "device_errors",
    "kl_estimate",
    "linear_clipped_policy_loss",
    "linear_logprobs_and_entropy",
    "logprobs_and_entropy",
]
