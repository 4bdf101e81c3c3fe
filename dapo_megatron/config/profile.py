"""Section `profile`: where the time and the memory of chosen steps go."""

from typing import Annotated

from pydantic import Field

from dapo_megatron.config.section import Section


class Profile(Section):
    """Traces and memory histories in the run directory, under profile/; nothing is recorded, and nothing costs, in
    other steps and on other ranks."""

    steps: list[Annotated[int, Field(ge=1)]] = Field(default_factory=list)
    """Rollout steps to record, as metrics count them, e.g. [3, 4]; the first ones are slow for reasons of their own."""

    ranks: list[Annotated[int, Field(ge=0)]] = Field(default_factory=lambda: [0])
    """Ranks that record."""

    shapes: bool = False
    """Whether traces hold the shapes of every operation's arguments."""

    stacks: bool = False
    """Whether traces hold the Python stack of every operation; slow, and large."""

    memory: bool = False
    """Whether the history of GPU memory in these steps is kept too, for pytorch.org/memory_viz; CUDA only."""

    nvtx: bool = False
    """Whether phases are marked for Nsight Systems, in all steps and on all ranks; CUDA only."""
