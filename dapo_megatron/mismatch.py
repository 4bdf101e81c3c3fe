"""The alarm on the difference between the learner's log-probs and the engine's: the last proof that weights arrived."""

from dapo_megatron.config import Recipe
from dapo_megatron.errors import RunError


def check_gap(recipe: Recipe, gap: float, step: int) -> None:
    """Compare the mean |log π_learner − log π_rollout| of a step with `resharding.max_logprob_gap`.

    Raises:
        RunError: the bound is exceeded; says what that means.
    """
    settings = recipe.resharding
    if settings.max_logprob_gap is not None and not gap <= settings.max_logprob_gap:
        raise RunError(
            f"mismatch alarm at step {step}: mean |log π_learner − log π_rollout| = {gap:.3g} exceeds "
            f"resharding.max_logprob_gap={settings.max_logprob_gap}. The rollout engine does not hold the learner's "
            "weights: "
            + (
                "look for a failed sync, a packed copy of the weights, or different temperatures"
                if settings.enabled
                else "resharding.enabled=false leaves the engine on its first weights; set it to true"
            ),
            on_every_rank=True,
        )
