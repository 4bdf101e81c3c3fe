"""Section `parallel`: how the learner is cut over ranks. What follows from it is in derive.py."""

from pydantic import Field

from dapo_megatron.config.section import Section


class Parallel(Section):
    """Sizes of the learner's parallel groups; data parallelism is what remains of the world."""

    tensor: int = Field(1, ge=1)
    """Tensor-parallel size (ranks); divides heads and ffn, and divides kv heads or is a multiple of them."""

    pipeline: int = Field(1, ge=1)
    """Pipeline-parallel size (ranks)."""

    virtual_pipeline: int = Field(1, ge=1)
    """Model chunks a pipeline rank, run interleaved; 1 = not interleaved."""

    context: int = Field(1, ge=1)
    """Context-parallel size (ranks): each has 1/context of every sequence, cut so that attention is balanced."""

    sequence: bool = False
    """Whether norms and residuals are cut along the sequence over the tensor-parallel ranks; needs tensor > 1."""

    world: int | None = Field(None, ge=1)
    """Learner ranks in all; null = tensor x pipeline x context. A world that exists already (torchrun, srun) wins."""
