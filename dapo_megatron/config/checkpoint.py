"""Section `checkpoint`: when the learner's state is saved and what is left at the end."""

from pydantic import Field

from dapo_megatron.config.section import Section


class Checkpoint(Section):
    """Sharded checkpoints in the run directory."""

    every: int = Field(10, ge=0)
    """Rollout steps between checkpoints; 0 = only at the end."""

    keep: int = Field(2, ge=1)
    """Newest checkpoints kept."""

    hugging_face: bool = True
    """Whether the trained model is written as a Hugging Face folder, `hf` in the run directory, at the end."""
