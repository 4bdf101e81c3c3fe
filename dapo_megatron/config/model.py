"""Section `model`: the policy to train, read from a folder or made new with random weights."""

from difflib import get_close_matches
from typing import Literal, Self

from pydantic import Field, model_validator

from dapo_megatron.config.known_models import KNOWN_MODELS
from dapo_megatron.config.problems import join_or
from dapo_megatron.config.section import Section


class Scratch(Section):
    """A model with random weights, built into the run directory together with its tokenizer."""

    family: Literal["qwen2", "llama", "qwen3"] = "qwen2"
    """Architecture family: qwen2 has biases on q, k and v, qwen3 normalises q and k, llama has neither."""

    hidden: int = Field(ge=1)
    """Width of the residual stream (channels)."""

    layers: int = Field(ge=1)
    """Number of transformer layers."""

    heads: int = Field(ge=1)
    """Query heads a layer."""

    kv_heads: int = Field(ge=1)
    """Key/value heads a layer; divides `heads`."""

    head_dim: int = Field(ge=2, multiple_of=2)
    """Channels a head; even, because rotary embedding turns pairs of channels."""

    ffn: int = Field(ge=1)
    """Width of the gated feed-forward layer (channels)."""

    tied: bool = False
    """Whether the output layer shares the embedding's weights."""

    rope_theta: float = Field(10000.0, gt=0)
    """Base of the rotary embedding's wavelengths (no unit)."""

    max_positions: int = Field(4096, ge=1)
    """Longest sequence, prompt and response together (tokens)."""

    vocab_multiple: int = Field(64, ge=1)
    """Vocabulary rows are the tokenizer's size rounded up to a multiple of this (rows)."""

    init_std: float = Field(0.02, gt=0)
    """Standard deviation of the initial weights."""

    tokenizer: str = Field("arithmetic", min_length=1)
    """`arithmetic` (one token a character of the generated task), or the folder of a tokenizer to copy."""

    @model_validator(mode="after")
    def _kv_heads_divide_heads(self) -> Self:
        if self.heads % self.kv_heads:
            works = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            nearest = min(works, key=lambda n: abs(n - self.kv_heads))
            raise ValueError(f"kv_heads={self.kv_heads} does not divide heads={self.heads}; use kv_heads={nearest}")
        return self


class Model(Section):
    """The policy: exactly one of `path` and `scratch`."""

    path: str | None = Field(None, min_length=1)
    """Hugging Face folder (config.json, safetensors, tokenizer) to start from; relative to the working directory."""

    architecture: str | None = Field(None, min_length=1)
    """Name of a published model, such as qwen2.5-32b: `plan` then needs no folder, and a folder of other sizes is
    refused; null = what the folder says."""

    scratch: Scratch | None = None
    """Sizes of a new model with random weights."""

    dtype: Literal["bf16", "fp32"] = "bf16"
    """Type of weights and activations in the learner; bf16 keeps fp32 main weights and gradients."""

    layer_spec: Literal["auto", "local", "transformer_engine"] = "auto"
    """Layers of the learner; auto takes Transformer Engine where it is installed on a GPU, else the local ones."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.path is None and self.scratch is None:
            raise ValueError("neither path nor scratch is given; set one of them")
        if self.path is not None and self.scratch is not None:
            raise ValueError("both path and scratch are given; set one of them to null")
        return self

    @model_validator(mode="after")
    def _architecture_is_known(self) -> Self:
        if self.architecture is None:
            return self
        if self.path is None:
            raise ValueError(f"architecture={self.architecture} is the shape of a folder; with scratch use null")
        if self.architecture not in KNOWN_MODELS:
            name = self.architecture.lower()
            alike = [name] if name in KNOWN_MODELS else get_close_matches(name, KNOWN_MODELS, n=3, cutoff=0.8)
            use = join_or([*(alike or KNOWN_MODELS), "null"])
            raise ValueError(f"architecture={self.architecture} is not known; use {use}")
        return self
