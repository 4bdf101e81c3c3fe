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
    """A penalty for leaving the reference policy of `algorithm.reference`.

    With D = log pi - log pi_ref of a drawn token: k1 = D, k2 = D^2 / 2, k3 = exp(-D) - 1 + D.
    """

    coefficient: float = Field(0.0, ge=0)
    """Weight of the penalty (per nat); 0 = off, no reference is kept."""

    place: Literal["loss", "reward"] = "loss"
    """loss adds it to the loss of every token; reward takes its sum over a response from the reward, before advantages
    and after dynamic sampling has looked at it; with advantage=gae each token is charged its own."""

    estimator: Literal["k1", "k2", "k3"] = "k3"
    """Which estimate of the divergence; k1 is for rewards only."""


class Reference(Section):
    """The reference policy that algorithm.kl and policy_loss: dpo measure from.

    It begins as the policy before its first rollout step, after supervised stages.
    """

    kind: Literal["fixed", "periodic", "ema"] = "fixed"
    """fixed: it stays that; periodic: after every `every`-th step it becomes the policy; ema: after each step every
    weight becomes decay * reference + (1 - decay) * policy, summed in fp32 whatever model.dtype is."""

    every: int = Field(10, ge=1)
    """Rollout steps between two moves of kind: periodic."""

    decay: float = Field(0.99, ge=0, le=1)
    """How much of the reference kind: ema keeps at each step (tau)."""

    placement: Literal["host", "resident"] = "host"
    """host: in host memory, swapped into the model to score; resident: a second model in bf16 beside it, 2 bytes a
    parameter, whatever model.dtype is, and nothing is swapped."""

    @property
    def moves(self) -> bool:
        """Whether it follows the policy."""
        return self.kind != "fixed"


class GAE(Section):
    """Advantages a token from the critic's values (arXiv 1506.02438): A_t = sum_k (gamma lam)^k d_(t+k), d_t = r_t +
    gamma V_(t+1) - V_t. The reward is at a response's last token, after which the value is 0."""

    gamma: float = Field(1.0, ge=0, le=1)
    """Discount of a reward a token later."""

    lam: float = Field(0.95, ge=0, le=1)
    """1 = rewards less the value, 0 = what one token changes in the values."""


class Cispo(Section):
    """Settings of policy_loss: cispo."""

    lower_clip: bool = False
    """Whether the ratio that weighs a token is bounded by 1 - eps_low too."""


class KLCov(Section):
    """Settings of policy_loss: kl-cov (arXiv 2505.22617)."""

    ratio: float = Field(2e-3, gt=0, le=1)
    """Share of a mini-batch's trained tokens, those of highest covariance, that is penalised; at least one token."""

    beta: float = Field(1.0, gt=0)
    """Weight of |log pi - log pi_old| on these tokens (per nat)."""


class DPO(Section):
    """Settings of policy_loss: dpo (arXiv 2305.18290), on pairs of responses to one prompt.

    margin = log pi(better) - log pi_ref(better) - log pi(worse) + log pi_ref(worse), sums over tokens
    """

    beta: float = Field(0.1, gt=0)
    """Multiplies the margin (per nat): how firmly the reference holds."""

    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Share of pairs whose label is taken to be the wrong way round."""

    pairs: Literal["best-worst", "all"] = "best-worst"
    """Of a group's responses: the one of highest reward with the one of lowest, or all whose rewards differ."""

    least_gap: float = Field(0.0, ge=0)
    """Pairs whose rewards differ by less are left out (reward units)."""


class AdaptiveEntropy(Section):
    """An entropy bonus whose coefficient c follows the entropy (Skywork-OR1, arXiv 2505.22312). c begins at
    `algorithm.entropy_coefficient`.

    With e, a step's mean token entropy before its updates: the bonus acts with c while e <= target; then c rises by
    `delta` if e < target and falls by it otherwise, between 0 and `max`.
    """

    target: float | None = Field(None, gt=0)
    """Entropy to keep (nats); null = a fixed coefficient."""

    delta: float = Field(0.005, gt=0)
    """How far the coefficient moves in a rollout step (per nat)."""

    max: float = Field(0.1, gt=0)
    """Highest coefficient (per nat)."""


class TokenSelection(Section):
    """Which trained tokens of a mini-batch keep their gradient; composes with every policy loss.

    cov = (A - mean A)(log pi - mean log pi), means over the mini-batch's trained tokens.
    """

    kind: str = Field("none", min_length=1)
    """none: all; high-entropy, low-entropy keep the highest, the lowest `ratio` by entropy; low-probability keeps
    tokens of p < threshold; clip-cov takes the gradient from a random few of high covariance; or a registered one."""

    ratio: float = Field(0.2, gt=0, le=1)
    """Share of tokens that high-entropy and low-entropy keep; exact, at least one token."""

    threshold: float = Field(0.9, gt=0, le=1)
    """Tokens of low-probability have less than this probability."""

    denominator: Literal["kept", "all"] = "kept"
    """Whether tokens without a gradient leave the loss's denominator; clip-cov always divides by all, and
    with loss_aggregation=constant-length kept is as all."""

    cov_ratio: float = Field(2e-4, gt=0, le=1)
    """Share of the trained tokens that clip-cov draws; at least one where there is a candidate."""

    cov_low: float = 1.0
    """Candidates of clip-cov have more covariance than this."""

    cov_high: float = 5.0
    """Candidates of clip-cov have less covariance than this."""


class Algorithm(Section):
    """What is learnt from graded groups: an advantage rule and a policy loss.

    Names are those of `dapo-megatron train --list-methods`, or of the user's own in `extensions`.
    """

    extensions: list[str] = Field(default_factory=list)
    """Python files that register advantages, policy losses and token selections of one's own; trusted code, run before
    anything else."""

    advantage: str = Field("group", min_length=1)
    """group: A = (R - mean R) / (std R + advantage_epsilon) over the responses to one prompt; group-mean: A = R -
    mean R (Dr.GRPO); leave-one-out: A = R - mean R of the others (RLOO); gae: a token each, by `gae` and section
    `critic` (PPO); or a registered one."""

    gae: GAE = GAE()
    """How rewards and values make advantages, with advantage=gae."""

    whiten: bool = False
    """Whether advantages are moved and scaled to mean 0 and standard deviation 1 over a step's trained tokens."""

    policy_loss: str = Field("clip", min_length=1)
    """clip: the clipped importance ratio (PPO, DAPO); gspo: a ratio a sequence; cispo: the clipped ratio as a weight of
    log pi; kl-cov: no clip, a penalty on tokens of high covariance; dpo: pairs of responses, better and worse, against
    a reference policy; or a registered one."""

    cispo: Cispo = Cispo()
    """Settings of policy_loss: cispo."""

    kl_cov: KLCov = KLCov()
    """Settings of policy_loss: kl-cov."""

    dpo: DPO = DPO()
    """Settings of policy_loss: dpo."""

    token_selection: TokenSelection = TokenSelection()
    """Which tokens keep their gradient."""

    statistics: Literal["old", "current", "micro_batch"] = "old"
    """What token_selection, kl-cov and dpo look at: old: log-probs and entropies of the old-policy pass, free; current:
    of one more scoring pass before each update; micro_batch: as current, over each micro-batch alone (as other systems
    do; the only one that changes with layout and micro-batch size)."""

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

    adaptive_entropy: AdaptiveEntropy = AdaptiveEntropy()
    """Moves this weight from step to step."""

    advantage_epsilon: float = Field(1e-6, ge=0)
    """Added to the standard deviation that divides the advantage (reward units)."""

    kl: KL = KL()
    """Penalty for leaving the reference policy; off in DAPO."""

    reference: Reference = Reference()
    """The policy that kl and dpo measure from."""

    dynamic_sampling: DynamicSampling = DynamicSampling()
    """Replacement of groups without a signal."""

    @property
    def needs_reference(self) -> bool:
        """Whether a reference policy is kept beside the one that learns."""
        return self.kl.coefficient > 0 or self.compares_pairs

    @property
    def compares_pairs(self) -> bool:
        """Whether the loss is one of pairs of responses, which no advantage enters."""
        return self.policy_loss == "dpo"
