"""Section `run`: what this run is called, where its files lie, how long it lasts."""

from pydantic import Field

from dapo_megatron.config.section import Section


class Run(Section):
    """Name, place and length of a run."""

    name: str = Field("run", min_length=1)
    """Name shown on the console, in the trackers and in the report."""

    directory: str = Field(min_length=1)
    """Folder for everything the run writes; relative to the current working directory."""

    steps: int = Field(100, ge=0)
    """Rollout steps to train; 0 runs the supervised stages only."""

    seed: int = Field(0, ge=0)
    """Seed of the weights, the prompt order and the samples."""

    stall_limit_s: float | None = Field(None, gt=0)
    """Longest a phase of a step may take (seconds); after it every rank tells its stack and the collective it waits in,
    and the run ends. null = four times the longest wait that the recipe allows anywhere."""

    stragglers_every: int = Field(10, ge=0)
    """Steps after which ranks compare their own seconds, those of all steps since the last time; 0 = never."""
