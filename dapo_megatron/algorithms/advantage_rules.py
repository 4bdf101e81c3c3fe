"""The built-in advantage rules: rewards of one prompt's responses → one advantage a response."""

import numpy as np

from dapo_megatron.algorithms.registry import GroupRewards, advantages, raised, register_advantage
from dapo_megatron.errors import RunError


@register_advantage("group", "A = (R − mean R) / (std R + advantage_epsilon) over the prompt's responses (GRPO, DAPO)")
def group(rewards: GroupRewards) -> np.ndarray:
    """arXiv 2402.03300; sample std; 0 where all rewards are equal."""
    return _group(rewards, divide=True)


@register_advantage("group-mean", "A = R − mean R over the prompt's responses (Dr.GRPO)")
def group_mean(rewards: GroupRewards) -> np.ndarray:
    """arXiv 2503.20783; 0 where all rewards are equal."""
    return _group(rewards, divide=False)


@register_advantage("leave-one-out", "A = R − mean R of the prompt's other responses (RLOO)")
def leave_one_out(rewards: GroupRewards) -> np.ndarray:
    """A_i = R_i − Σ_{j≠i} R_j / (G − 1) (arXiv 2402.14740): (R_i − mean R) · G / (G − 1)."""
    count = len(rewards.rewards_G)
    return _group(rewards, divide=False).astype(np.float64) * (count / (count - 1))


@register_advantage("gae", "GAE(gae.gamma, gae.lam) a token, from the values of section critic (PPO)", least_samples=1)
def gae(rewards: GroupRewards) -> np.ndarray:
    """arXiv 1506.02438, 1707.06347; gae.py computes it from a critic's values, which no rule on rewards alone has."""
    raise RunError("algorithm.advantage=gae needs the values of a critic, and there is none here")


def advantages_of(name: str, rewards: GroupRewards) -> np.ndarray:
    """fp32 [G] by the registered rule `name`.

    Raises:
        RunError: the rule raised, or did not return one finite number a response.
    """
    try:
        found = np.asarray(advantages()[name].compute(rewards), dtype=np.float64)
    except RunError:
        raise
    except Exception as error:
        told = f"algorithm.advantage={name} raised {raised(error)} on rewards {rewards.rewards_G.tolist()}"
        raise RunError(told) from None
    if found.shape != rewards.rewards_G.shape or not np.isfinite(found).all():
        raise RunError(
            f"algorithm.advantage={name} returned {found.tolist()} for rewards {rewards.rewards_G.tolist()}; it must "
            "return one finite number a response"
        )
    return found.astype(np.float32)


def _group(rewards: GroupRewards, *, divide: bool) -> np.ndarray:
    from dapo_megatron.algorithms.advantages import group_advantages  # imports torch

    return group_advantages(rewards.rewards_G[None], epsilon=rewards.epsilon, divide=divide)[0]
