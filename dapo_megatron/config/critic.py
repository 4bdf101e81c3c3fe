"""Section `critic`: the model of values behind algorithm.advantage=gae."""

from pydantic import Field

from dapo_megatron.config.section import Section


class Critic(Section):
    """A second model with a value head, cut over the ranks as the policy is; only with algorithm.advantage=gae.

    Its optimizer has the settings of `optimizer`, but for a learning rate of its own, which is constant.
    """

    path: str | None = Field(None, min_length=1)
    """Hugging Face folder to start from, with or without a value head; null = the policy before its first rollout
    step."""

    learning_rate: float = Field(1e-5, ge=0)
    """Learning rate of the critic."""

    value_clip: float | None = Field(0.2, gt=0)
    """The loss sees a value at most this far from the one before the step's updates (reward units); null = not."""

    epochs: int = Field(1, ge=1)
    """Passes over the responses of a step, a mini-batch as large as the policy's at a time."""

    warmup_steps: int = Field(0, ge=0)
    """First rollout steps that train the critic alone."""
