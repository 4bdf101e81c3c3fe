"""The check of nodes before a run: what it complains of, and the real thing over gloo."""

import os
from typing import Any

import pytest

from dapo_megatron.config.load import build_recipe
from dapo_megatron.errors import RunError
from dapo_megatron.launch import world_from_environment
from dapo_megatron.slurm.node_health import Finding, check_nodes, complaints
from tests.ranks import run_ranks

SOUND = Finding("n1", gpus=8, free_gb=500.0, node_gb_per_s=300.0, world_gb_per_s=90.0)


def recipe(*overrides: str):
    return build_recipe({"run": {"directory": "runs/a"}, "model": {"path": "m"}}, overrides)


def other(**changes: Any) -> Finding:
    return Finding(**{**SOUND.__dict__, "node": "n2", **changes})


@pytest.mark.parametrize(
    ("second", "told"),
    [
        (other(), []),
        (other(gpus=7), ["n2: 7 GPUs where slurm.gpus_per_node asks for 8"]),
        (other(free_gb=9.5), ["n2: 9.5 GB free for run.directory=runs/a, below slurm.least_disk_gb=10"]),
        (other(node_gb_per_s=40.0), ["n2: all-reduce inside the node at 40.00 GB/s, below slurm.least_gb_per_s=80"]),
        (other(node_gb_per_s=0.0), []),  # one rank on the node
        (other(world_gb_per_s=3.0), ["all-reduce between all 2 nodes at 3.00 GB/s, below slurm.least_gb_per_s=80"]),
    ],
)
def test_a_fault_is_told_with_the_node_that_has_it(second, told):
    assert complaints([SOUND, second], recipe("slurm.least_gb_per_s=80", "slurm.nodes=2")) == told


def test_one_node_has_no_links_between_nodes():
    alone = Finding("n1", gpus=1, free_gb=50.0, node_gb_per_s=0.0, world_gb_per_s=0.0)
    assert complaints([alone], recipe("slurm.least_gb_per_s=80", "slurm.gpus_per_node=1")) == []


def check_here(payload: dict[str, Any]) -> list[str]:
    """On a rank: what the check says of this machine under each recipe."""
    said = []
    for overrides in payload["overrides"]:
        try:
            check_nodes(recipe(*overrides), world_from_environment(os.environ))
            said.append("fit")
        except RunError as error:
            assert error.on_every_rank
            said.append(str(error))
    return said


@pytest.mark.distributed
def test_two_ranks_measure_their_node():
    cpu = ["learner.device=cpu", "parallel.tensor=2", "slurm.least_disk_gb=0"]
    cases = [cpu, [*cpu, "slurm.least_gb_per_s=1e6"], [*cpu, "slurm.least_disk_gb=1e9"], ["slurm.gpus_per_node=2"]]
    fit, slow, full, no_gpu = run_ranks(2, "tests.slurm.test_node_health:check_here", {"overrides": cases})
    assert fit == "fit"
    assert "all-reduce inside the node at" in slow and "below slurm.least_gb_per_s=1e+06" in slow
    assert "GB free for run.directory=runs/a, below slurm.least_disk_gb=1e+09" in full
    assert "0 GPUs where slurm.gpus_per_node asks for 2" in no_gpu
