"""How a critic begins: as the policy, but for its head."""

import torch
import torch.distributed as dist

from dapo_megatron.config.resharding import Resharding
from dapo_megatron.learner.learner import Learner
from dapo_megatron.resharding.hf_layout import VALUE_HEAD
from dapo_megatron.resharding.plan import make_plan
from dapo_megatron.resharding.transport import Transport


@torch.no_grad()
def copy_decoder(policy: Learner, critic: Learner, settings: Resharding) -> None:
    """The policy's present weights become the critic's, by a resharding plan: copies inside each rank where both are
    cut alike, messages where they are not. The value head stays. Collective over the world.

    Both are of one architecture, head apart.
    """
    rank = dist.get_rank()
    shared = [name for name in critic.weight_layout.shapes if name not in VALUE_HEAD]
    source, target = policy.weight_layout.only(shared), critic.weight_layout.only(shared)
    transport = Transport(
        make_plan(source, target),
        rank,
        dtype=critic.dtype,
        device=critic.device,
        bucket_bytes=settings.bucket_mib << 20,
        window=settings.window,
        time_limit_s=settings.time_limit_s,
    )
    weights = critic.weights
    for key in {placement.key for placement in target.placements[rank]}:
        weights[key].zero_()  # the rows that pad the vocabulary come from nowhere
    transport.run(policy.weights, weights)
    if critic.optimizer is not None:
        critic.optimizer.reload_model_params()  # its fp32 copies of bf16 weights
