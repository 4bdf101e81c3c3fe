"""Section `resharding`: moving new weights from the learner into the rollout engines."""

from typing import Literal

from pydantic import Field

from dapo_megatron.config.section import Section


class Resharding(Section):
    """The weight transfer after every rollout step, and the alarm on its result."""

    enabled: bool = True
    """Whether engines get the new weights; false is a control experiment."""

    max_logprob_gap: float | None = Field(0.5, gt=0)
    """Mean |log pi_learner - log pi_rollout| over sampled tokens that stops the run (nats); null = only logged."""

    transport: Literal["auto", "shared", "relay", "group"] = "auto"
    """How weights reach vllm engines: shared = engines on the learner's machine copy out of its memory; relay = so on
    each of several machines, and what comes from elsewhere crosses once a machine; group = messages to every engine;
    auto = shared or relay where engines stand beside the learner, else group."""

    verify: Literal["first", "always", "never"] = "first"
    """After which syncs the checksums of all slices are compared on both sides (vllm engines)."""

    window: int = Field(256, ge=1)
    """Most send and receive operations in flight on a rank."""

    time_limit_s: float = Field(120.0, gt=0)
    """Longest time for one transfer of all weights (seconds)."""

    bucket_mib: int = Field(256, ge=1)
    """Largest buffer of weights in flight on a rank (MiB)."""
