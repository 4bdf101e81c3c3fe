"""How a critic begins: as the policy, but for its head."""

import torch
import torch.distributed as dist

from dapo_megatron.learner.learner import Learner
from dapo_megatron.resharding.hf_layout import VALUE_HEAD


@torch.no_grad()
def copy_decoder(policy: Learner, critic: Learner) -> None:
    """The policy's present weights become the critic's, on every rank its own shard; the value head stays.

    Both are of one architecture, head apart, under one layout.
    """
    placements = critic.weight_layout.placements[dist.get_rank()]
    head = {placement.key for placement in placements if placement.name in VALUE_HEAD}
    for key, weight in critic.weights.items():
        if key not in head:
            weight.copy_(policy.weights[key])
    if critic.optimizer is not None:
        critic.optimizer.reload_model_params()  # its fp32 copies of bf16 weights
