"""The built-in policy losses: a loss a token, from the log-probs of a micro-batch's trained tokens.

With r = exp(clamp(log π − log π_old, −20, 20)), gradient 0 where the clamp is active, and A the advantage. Importance
weights, aggregation, denominator, entropy bonus and KL term are applied outside, to every loss alike.

No torch is imported: a recipe's names are checked before ranks start, tensors bring their own arithmetic.
"""

from typing import TYPE_CHECKING

from dapo_megatron.algorithms.registry import TokenBatch, TokenLosses, register_policy_loss

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING = 1e-5  # nats: what fp32 log-probs of one policy differ by between layouts


@register_policy_loss(
    "clip", "−min(r·A, clip(r, 1 − eps_low, 1 + eps_high)·A), eps_dual bounds it for A < 0 (PPO, DAPO)", dual_clip=True
)
def clip(tokens: TokenBatch) -> TokenLosses:
    """PPO (arXiv 1707.06347, eq. 7), DAPO (2503.14476, eq. 8), dual clip (1912.09729, eq. 5).

    The learner uses the fused kernel for it, `dapo_kernels.clipped_policy_loss`; this is the same on rows.
    """
    ratio_N = tokens.log_ratio().exp()
    losses_N, low_N, high_N = _clipped(tokens, ratio_N)
    if tokens.eps_dual is None:
        return TokenLosses(losses_N, ratio_N.detach(), low_N, high_N)
    dual_N = (tokens.advantages_N < 0) & (ratio_N > tokens.eps_dual)
    bound_N = -tokens.eps_dual * tokens.advantages_N
    return TokenLosses(bound_N.where(dual_N, losses_N), ratio_N.detach(), low_N, high_N, dual_N)


@register_policy_loss(
    "gspo",
    "the clip on a ratio a sequence, exp(mean log-ratio of its trained tokens); needs sequence-mean (GSPO)",
    aggregations=("sequence-mean",),
    reason="its ratio, its clip and its mean are a sequence's",
)
def gspo(tokens: TokenBatch) -> TokenLosses:
    """arXiv 2507.18071, eq. 5 and 7: s_i = exp(1/|o_i| Σ_t log r_it), −min(s_i·A, clip(s_i)·A), mean over sequences.

    The clamp is on the mean. Published ε: 3e-4 below, 4e-4 above.
    """
    gap_N = tokens.mean_of_sequence(tokens.logprobs_N - tokens.old_logprobs_N)
    ratio_N = gap_N.clamp(-20.0, 20.0).exp()
    losses_N, low_N, high_N = _clipped(tokens, ratio_N)
    return TokenLosses(losses_N, ratio_N.detach(), low_N, high_N)


@register_policy_loss(
    "cispo", "−stop_gradient(min(r, 1 + eps_high))·A·log π; cispo.lower_clip adds 1 − eps_low (CISPO)"
)
def cispo(tokens: TokenBatch) -> TokenLosses:
    """arXiv 2506.13585, eq. 4: a clipped ratio weighs the token, and every token keeps its gradient."""
    ratio_N = tokens.log_ratio().exp().detach()
    high_N = ratio_N > 1 + tokens.eps_high
    weight_N = ratio_N.clamp(max=1 + tokens.eps_high)
    low_N = None
    if tokens.clips_low:
        low_N = ratio_N < 1 - tokens.eps_low
        weight_N = weight_N.clamp(min=1 - tokens.eps_low)
    return TokenLosses(-weight_N * tokens.advantages_N * tokens.logprobs_N, ratio_N, low_N, high_N)


@register_policy_loss(
    "kl-cov", "−r·A unclipped, + kl_cov.beta·|log π − log π_old| on the kl_cov.ratio of tokens of highest covariance"
)
def kl_cov(tokens: TokenBatch) -> TokenLosses:
    """KL-Cov (arXiv 2505.22617); `penalties_N` is β on the selected tokens, 0 elsewhere.

    The penalty begins at 1e-5 nats: before the policy has moved, the sign of its gradient would be that of a rounding
    error, which differs from layout to layout.
    """
    ratio_N = tokens.log_ratio().exp()
    distance_N = (tokens.logprobs_N - tokens.old_logprobs_N).abs()
    penalty_N = tokens.penalties_N * distance_N.where(distance_N > ROUNDING, 0.0)
    return TokenLosses(-ratio_N * tokens.advantages_N + penalty_N, ratio_N.detach())


@register_policy_loss(
    "dpo", "−log σ(β·margin) of pairs of responses; dpo.beta, dpo.label_smoothing; sees a reference policy"
)
def dpo(tokens: TokenBatch) -> TokenLosses:
    """DPO (arXiv 2305.18290, eq. 7): −A·log π, where A is ± the slope of the pair's loss (`algorithms/pairs.py`)."""
    return TokenLosses(-tokens.advantages_N * tokens.logprobs_N, tokens.log_ratio().detach().exp())


def _clipped(tokens: TokenBatch, ratio_N: "Tensor") -> tuple["Tensor", "Tensor", "Tensor"]:
    """−min(r·A, clip(r)·A) [N], and where the clip cut below and above; at an edge the unclipped gradient flows."""
    low_N = (tokens.advantages_N < 0) & (ratio_N < 1 - tokens.eps_low)
    high_N = (tokens.advantages_N > 0) & (ratio_N > 1 + tokens.eps_high)
    bounded_N = ratio_N.clamp(1 - tokens.eps_low, 1 + tokens.eps_high).detach()
    return -bounded_N.where(low_N | high_N, ratio_N) * tokens.advantages_N, low_N, high_N
