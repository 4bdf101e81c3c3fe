"""Section `algorithm`: the policy loss and which groups it sees (DAPO, arXiv 2503.14476)."""

from typing import Literal

from pydantic import Field

from dapo_megatron.config.section import Section


class DynamicSampling(Section):
    """Groups without a signal are dropped and more prompts are sampled until the batch is full."""

    enabled: bool = True
    """Whether uniform groups are replaced."""

    max_waves: int = Field(10, ge=1)
    """Most rounds of sampling in a step; after them the step trains on what it has."""

    over_sampling: float = Field(1.0, ge=1)
    """Prompts of a round as a multiple of rollout.prompts_per_step."""

    adaptive: bool = True
    """Whether a round asks for fewer prompts where, by the recent share of mixed groups, fewer are enough."""

    keep_surplus: bool = True
    """Whether mixed groups beyond those wanted are kept for the next step."""

    max_age: int = Field(2, ge=1)
    """Oldest surplus trained on (rollout steps since it was drawn)."""

    metric: Literal["accuracy", "reward_std"] = "accuracy"
    """accuracy keeps groups with some right and some wrong; reward_std keeps groups whose rewards differ."""


class KL(Section):
    """A penalty for leaving the reference: the frozen policy before its first rollout step, after supervised stages.

    With D = log pi - log pi_ref of a drawn token: k1 = D, k2 = D^2 / 2, k3 = exp(-D) - 1 + D.
    """

    coefficient: float = Field(0.0, ge=0)
    """Weight of the penalty (per nat); 0 = off, no reference is kept."""

    place: Literal["loss", "reward"] = "loss"
    """loss adds it to the loss of every token; reward takes its sum over a response from the reward, before advantages
    and after dynamic sampling has looked at it; with advantage=gae each token is charged its own."""

    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Which estimate of the divergence; k1 is for rewards only."""


class GAE(Section):
    """Advantages a token from the critic's values (arXiv 1506.02438): A_t = sum_k (gamma lam)^k d_(t+k), d_t = r_t +
    gamma V_(t+1) - V_t. The reward is at a response's last token, after which the value is 0."""

    gamma: float = Field(1.0, ge=0, le=1)
    """Discount of a reward a token later."""

    lam: float = Field(0.95, ge=0, le=1)
    """1 = rewards less the value, 0 = what one token changes in the values."""


class Algorithm(Section):
    """Clipped policy gradient with group advantages, or with those of a critic (PPO)."""

    advantage: Literal["group", "group-mean", "gae"] = "group"
    """group: A = (R - mean R) / (std R + advantage_epsilon) over the responses to one prompt; group-mean: A = R -
    mean R (Dr.GRPO); gae: a token each, by `gae` and section `critic` (PPO)."""

    gae: GAE = GAE()
    """How rewards and values make advantages, with advantage=gae."""

    whiten: bool = False
    """Whether advantages are moved and scaled to mean 0 and standard deviation 1 over a step's trained tokens."""

    eps_low: float = Field(0.2, ge=0, le=1)
    """The importance ratio is clipped below at 1 - eps_low."""

    eps_high: float = Field(0.28, ge=0)
    """The importance ratio is clipped above at 1 + eps_high."""

    eps_dual: float | None = None
    """For A < 0 the loss of a token is bounded by -eps_dual A; more than 1, null = no bound."""

    mini_batch_prompts: int = Field(32, ge=1)
    """Prompts in one gradient update; divides rollout.prompts_per_step."""

    loss_aggregation: Literal["token-mean", "sequence-mean", "constant-length"] = "token-mean"
    """token-mean divides by the mini-batch's response tokens; sequence-mean averages within, then over responses;
    constant-length divides by responses times rollout.max_response_length (Dr.GRPO)."""

    importance_bound: float | None = Field(None, gt=0)
    """Truncated importance sampling: tokens weigh min(old policy / engine's probability, this bound); null = not."""

    overlong_filtering: bool = True
    """Whether truncated responses lose their loss mask; they stay in their group's mean and std."""

    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus in the loss (per nat)."""

    advantage_epsilon: float = Field(1e-6, ge=0)
    """Added to the standard deviation that divides the advantage (reward units)."""

    kl: KL = KL()
    """Penalty for leaving the reference policy; off in DAPO."""

    dynamic_sampling: DynamicSampling = DynamicSampling()
    """Replacement of groups without a signal."""
