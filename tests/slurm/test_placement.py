"""Which nodes a recipe's ranks lie on, and what is refused before anything is submitted."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.config import Recipe, load_recipe
from dapo_megatron.config.load import build_recipe
from dapo_megatron.errors import RequestError
from dapo_megatron.planning.plan import plan_run
from dapo_megatron.prepare import planned_architecture
from dapo_megatron.slurm.placement import place_ranks
from tests.command_line import ROOT

GPU = sorted(path.stem for path in (ROOT / "recipes" / "gpu").glob("*.yaml") if not path.stem.endswith("base"))


def recipe(*overrides: str) -> Recipe:
    return build_recipe({"run": {"directory": "runs/a"}, "model": {"path": "m"}}, overrides)


def test_a_rank_a_gpu_and_without_gpus_the_learners_ranks():
    gpus = place_ranks(recipe("parallel.tensor=4", "slurm.nodes=16"))
    assert (gpus.world, gpus.tasks_per_node, gpus.gpus_per_node, gpus.seconds) == (128, 8, 8, 86400)
    cpus = place_ranks(recipe("learner.device=cpu", "parallel.tensor=2", "parallel.world=8", "slurm.nodes=2"))
    assert (cpus.world, cpus.tasks_per_node, cpus.gpus_per_node) == (8, 4, 0)
    engines = place_ranks(recipe("slurm.tasks_per_node=6", "parallel.tensor=2", "slurm.time_limit='2-01:00:30'"))
    assert (engines.world, engines.gpus_per_node, engines.seconds) == (6, 8, 176430)


@pytest.mark.parametrize(
    ("overrides", "nodes", "tasks", "gpus"),
    [
        (["parallel.world=128"], 16, 8, 8),
        (["parallel.world=1"], 1, 1, 1),
        (["parallel.world=16", "hardware.gpus_per_node=4"], 4, 4, 4),
        (["parallel.world=4", "learner.device=cpu"], 1, 4, 0),
        (["parallel.tensor=4"], 1, 8, 8),
    ],
)
def test_nodes_follow_from_the_world_and_the_hardware(overrides, nodes, tasks, gpus):
    found = place_ranks(recipe(*overrides))
    assert (found.nodes, found.tasks_per_node, found.gpus_per_node) == (nodes, tasks, gpus)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            ["parallel.pipeline=12"],
            "= 8 ranks, which is not a multiple of 12 = parallel.tensor 1 x .*use slurm.nodes=3",
        ),
        (["parallel.world=24", "slurm.nodes=1"], "parallel.world=24; use slurm.nodes=3 or parallel.world=8"),
        (["parallel.world=9"], "parallel.world=9; use parallel.world=16"),
        (["slurm.tasks_per_node=9"], "tasks_per_node=9 ranks share slurm.gpus_per_node=8; use 8 or fewer"),
        (["learner.device=cpu", "slurm.gpus_per_node=2"], "slurm.gpus_per_node=2 with learner.device=cpu .*; use 0"),
        (["learner.device=cuda", "slurm.gpus_per_node=0"], "slurm.gpus_per_node=0 with learner.device=cuda"),
        (["slurm.time_limit='90'"], 'slurm.time_limit="90" is neither hours:minutes:seconds'),
        (
            ["slurm.time_limit='00:10:00'"],
            "slurm.stop_before_s=1200 leaves .*00:10:00 no time to train; use at most 300",
        ),
        (["run.directory='runs/my run'"], 'run.directory="runs/my run"'),
        (["run.directory='runs/%j'"], "run.directory="),
        (["slurm.partition='a b'"], 'slurm.partition="a b": slurm\'s names'),
        (["slurm.memory=lots"], 'slurm.memory="lots": use for example "900G"'),
        (["slurm.container_image='a\nb'"], "slurm.container_image="),
        (["slurm.container_mounts=['/a:/b $(x)']"], r"slurm.container_mounts\[0\]="),
        (["slurm.environment=['A=1', 'B=$(rm x)']"], r"slurm.environment\[1\]=.*slurm.setup"),
        (['slurm.setup=["a\\nb"]'], r"slurm.setup\[0\]="),
        (["slurm.options=['-N2']"], r"slurm.options\[0\]="),
        (["slurm.options=['--nodes=2']"], r"--nodes follows from the recipe's other settings"),
    ],
)
def test_what_cannot_be_is_refused_with_what_works(overrides, told):
    with pytest.raises(RequestError, match=told):
        place_ranks(recipe(*overrides))


def test_every_broken_rule_is_told_at_once():
    with pytest.raises(RequestError) as caught:
        place_ranks(recipe("parallel.world=9", "slurm.time_limit=x", "slurm.qos='?'"))
    assert len(str(caught.value).splitlines()) == 3


@given(st.integers(1, 6), st.integers(1, 9), st.sampled_from([1, 2, 4, 8]), st.integers(1, 6))
def test_the_proposed_number_of_nodes_works(nodes, tasks, tensor, pipeline):
    settings = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}", f"slurm.tasks_per_node={tasks}"]
    settings += ["slurm.gpus_per_node=16"]
    try:
        assert place_ranks(recipe(*settings, f"slurm.nodes={nodes}")).world % (tensor * pipeline) == 0
    except RequestError as refused:
        (proposed,) = [line.rpartition("use ")[2] for line in str(refused).splitlines()]
        assert place_ranks(recipe(*settings, proposed)).world % (tensor * pipeline) == 0


@pytest.mark.parametrize("name", GPU)
def test_gpu_recipes_ask_for_their_world_and_for_time_to_end_a_step(name):
    found = load_recipe(ROOT / "recipes" / "gpu" / f"{name}.yaml")
    placement = place_ranks(found)
    assert placement.world == found.parallel.world
    plan = plan_run(found, planned_architecture(found, folder_needed=False))
    assert plan.time.seconds < found.slurm.stop_before_s < placement.seconds
