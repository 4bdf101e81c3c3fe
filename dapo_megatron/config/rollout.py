"""Section `rollout`: the engine that samples responses, and how many and how long they are."""

from typing import Annotated, Literal

from pydantic import Field

from dapo_megatron.config.section import Section


class Partition(Section):
    """Where segments end (SPO, arXiv 2505.23564)."""

    kind: Literal["cutpoint", "fixed"] = "cutpoint"
    """cutpoint: behind every `cutpoints`-th token drawn with a probability below `threshold`; fixed: behind every
    `tokens` tokens."""

    threshold: float = Field(0.9, gt=0, le=1)
    """A token drawn with less than this probability is a cutpoint."""

    cutpoints: int = Field(5, ge=1)
    """Cutpoints a segment."""

    tokens: int = Field(100, ge=1)
    """Length of a fixed segment; in a tree the longest segment of any level but the last, of either kind (tokens)."""


class Chain(Section):
    """Settings of rollout.shape: chain."""

    continuations: int = Field(9, ge=1)
    """Continuations drawn at each boundary; their mean reward is its value."""


class Tree(Section):
    """Settings of rollout.shape: tree."""

    branching: list[Annotated[int, Field(ge=1)]] = Field(default_factory=lambda: [6, 6, 6], min_length=1)
    """Children of the prompt, then of each node of the next level, and so on; the last level runs to its end."""

    normalise: Literal["none", "std"] = "none"
    """none: A = V(node) - V(parent); std: divided by (std + algorithm.advantage_epsilon) of V over the node and its
    siblings."""


class Rollout(Section):
    """Sampling for training; sampling for validation is in section `evaluation`."""

    engine: Literal["hf", "vllm"] = "hf"
    """hf = transformers inside every learner rank; vllm = engine processes beside the learner."""

    placement: Literal["colocated", "disaggregated"] = "colocated"
    """Whether engines share the learner's devices or have their own; disaggregated needs engine vllm."""

    @property
    def beside_learner(self) -> bool:
        """Whether vllm engines of the run's own share the learner's devices."""
        return self.engine == "vllm" and self.placement == "colocated" and not self.servers

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

    samples_per_prompt: int = Field(16, ge=1)
    """Responses a prompt: the group over which advantages are computed; of a tree its leaves, where none ends early."""

    shape: Literal["independent", "chain", "tree", "preferences"] = "independent"
    """How the responses to a prompt come about. independent: each is drawn by itself, algorithm.advantage looks at the
    rewards; chain: likewise, cut into segments that are valued by continuing prefixes; tree: they branch, segments are
    valued from the leaves up; preferences: nothing is drawn for training, the two responses to each prompt are those of
    data.train's chosen and rejected columns (DPO from a file)."""

    partition: Partition = Partition()
    """Segments of shape chain or tree."""

    chain: Chain = Chain()
    """Value estimate of shape chain."""

    tree: Tree = Tree()
    """Value estimate of shape tree."""

    prompts_per_step: int = Field(512, ge=1)
    """Prompts (groups) trained on in a rollout step."""

    max_response_length: int = Field(20480, ge=1)
    """Longest response (tokens); a response cut here counts as truncated."""

    temperature: float = 1.0
    """Sampling temperature (divides the logits); more than 0."""

    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus mass to sample from; training needs 1."""

    max_batch_sequences: int = Field(256, ge=1)
    """Sequences an engine decodes at once (hf: on a rank)."""

    time_limit_s: float = Field(3600.0, gt=0)
    """Longest wait for the responses of a step (seconds)."""
