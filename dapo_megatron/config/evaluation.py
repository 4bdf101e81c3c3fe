"""Section `evaluation`: accuracy on the validation prompts while training."""

from pydantic import Field

from dapo_megatron.config.section import Section


class Evaluation(Section):
    """Sampling for validation; unlike training it may cut the distribution."""

    every: int = Field(10, ge=0)
    """Rollout steps between validations; 0 = never. Without validation prompts there is none."""

    samples: int = Field(4, ge=1)
    """Samples a prompt, the k of avg@k (accuracy), pass@k and maj@k."""

    temperature: float = Field(1.0, ge=0)
    """Sampling temperature (divides the logits); 0 = the most likely token, which makes all samples equal."""

    fork_temperature: float | None = Field(None, ge=0)
    """Temperature of tokens whose entropy at temperature 1 exceeds `entropy_threshold`, `temperature` being that of all
    others (arXiv 2506.01939); 0 = the most likely token, null = one temperature. For rollout.engine=hf."""

    entropy_threshold: float | None = Field(None, ge=0)
    """What `fork_temperature` begins above (nats); `dapo-megatron analyze entropy` tells a model's percentiles."""

    top_p: float = Field(0.7, gt=0, le=1)
    """Nucleus mass to sample from."""

    greedy: bool = True
    """Whether one more response a prompt is decoded greedily."""

    max_prompts: int | None = Field(None, ge=1)
    """Validation prompts used, from the start of the file; null = all."""

    seed: int = Field(0, ge=0)
    """Seed of the validation samples, the same at every validation."""
