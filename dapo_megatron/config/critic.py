"""Section `critic`: the model of values behind algorithm.advantage=gae."""

from pydantic import Field

from dapo_megatron.config.section import Section


class CriticParallel(Section):
    """How the critic is cut over the policy's ranks: data parallelism is what remains of them."""

    tensor: int | None = Field(None, ge=1)
    """Tensor-parallel size (ranks); null = parallel.tensor."""

    pipeline: int | None = Field(None, ge=1)
    """Pipeline-parallel size (ranks); null = parallel.pipeline."""

    virtual_pipeline: int | None = Field(None, ge=1)
    """Model chunks a pipeline rank, run interleaved; null = parallel.virtual_pipeline where both have the same pipeline
    size, else 1."""

    sequence: bool | None = None
    """Whether norms and residuals are cut along the sequence; null = parallel.sequence where the critic's tensor > 1,
    else false."""


class Critic(Section):
    """A second model with a value head, on the policy's ranks; only with algorithm.advantage=gae.

    Its optimizer has the settings of `optimizer`, but for a learning rate of its own, which is constant.
    """

    path: str | None = Field(None, min_length=1)
    """Hugging Face folder to start from, with or without a value head; null = the policy before its first rollout
    step."""

    parallel: CriticParallel = CriticParallel()
    """How the critic is cut over the policy's ranks; null = as the policy."""

    learning_rate: float = Field(1e-5, ge=0)
    """Learning rate of the critic."""

    value_clip: float | None = Field(0.2, gt=0)
    """The loss sees a value at most this far from the one before the step's updates (reward units); null = not."""

    epochs: int = Field(1, ge=1)
    """Passes over the responses of a step, a mini-batch as large as the policy's at a time."""

    warmup_steps: int = Field(0, ge=0)
    """First rollout steps that train the critic alone."""
