"""Section `hardware`: the machines that a recipe is meant for; `plan` counts with them, a run takes what it finds."""

from typing import Literal

from pydantic import Field

from dapo_megatron.config.section import Section


class Hardware(Section):
    """What `dapo-megatron plan` takes a rank to run on; not looked at with learner.device=cpu."""

    gpu: Literal["h100", "h200", "a100"] = "h100"
    """The card of every rank: H100 80 GB, H200 141 GB or A100 80 GB, each with NVLink inside a node."""

    gpus_per_node: int = Field(8, ge=1)
    """GPUs of a node; ranks of a node are neighbours."""
