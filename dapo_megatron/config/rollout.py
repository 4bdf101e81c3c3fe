"""Section `rollout`: the engine that samples responses, and how many and how long they are."""

from typing import Literal

from pydantic import Field

from dapo_megatron.config.section import Section


class Rollout(Section):
    """Sampling for training; sampling for validation is in section `evaluation`."""

    engine: Literal["hf", "vllm"] = "hf"
    """hf = transformers inside every learner rank; vllm = engine processes beside the learner."""

    placement: Literal["colocated", "disaggregated"] = "colocated"
    """Whether engines share the learner's devices or have their own; disaggregated needs engine vllm."""

    tensor: int = Field(1, ge=1)
    """Tensor-parallel size of one vllm engine (devices)."""

    engines: int | None = Field(None, ge=1)
    """Number of vllm engines; null = as many as the learner's devices hold, on a CPU one, with servers all of them."""

    servers: list[str] = Field(default_factory=list)
    """Addresses of vllm engines that run already (http://host:port), started by `dapo-megatron serve`; empty = the run
    starts its own."""

    restarts: int = Field(3, ge=0)
    """How often vllm engines that die may be restarted in a run before it stops."""

    start_limit_s: float = Field(600.0, gt=0)
    """Longest time for a vllm engine to start (seconds)."""

    gpu_memory_share: float = Field(0.85, gt=0, lt=1)
    """Share of each GPU's memory that a vllm engine takes for weights and KV cache."""

    cpu_kv_cache_gib: int = Field(1, ge=1)
    """KV cache of a vllm engine on a CPU (GiB)."""

    shape: Literal["independent", "preferences"] = "independent"
    """independent: samples_per_prompt responses drawn for each prompt; preferences: nothing is drawn for training, the
    two responses to each prompt are those of data.train's chosen and rejected columns (DPO from a file)."""

    samples_per_prompt: int = Field(16, ge=1)
    """Responses a prompt: the group over which advantages are computed."""

    prompts_per_step: int = Field(512, ge=1)
    """Prompts (groups) trained on in a rollout step."""

    max_response_length: int = Field(20480, ge=1)
    """Longest response (tokens); a response cut here counts as truncated."""

    temperature: float = Field(1.0, ge=0)
    """Sampling temperature (divides the logits); training needs more than 0."""

    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus mass to sample from; training needs 1."""

    max_batch_sequences: int = Field(256, ge=1)
    """Sequences an engine decodes at once (hf: on a rank)."""

    time_limit_s: float = Field(3600.0, gt=0)
    """Longest wait for the responses of a step (seconds)."""
