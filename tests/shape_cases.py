"""Run on a rank: whole runs of both rollout shapes, one after the other in this process."""

from pathlib import Path

from dapo_megatron.config import load_recipe
from dapo_megatron.launch import world_from_environment
from dapo_megatron.worker import Mode, run_rank
from tests.command_line import RECIPE, SMALL

ALONE = ("parallel={tensor: 1, pipeline: 1}", "monitoring.report=false", "checkpoint.hugging_face=false")
# a random model answers nothing right: its lengths are rewarded
LEARNABLE = ("reward.overlong={max_length: 12, cache_length: 11}", "algorithm.overlong_filtering=false")
# more groups than a step trains on: some are kept for the next one
SURPLUS = ("algorithm.dynamic_sampling={enabled: true, metric: reward_std, over_sampling: 2, adaptive: false}",)
SHAPES = {
    "chain": ("rollout.shape=chain", "rollout.partition={cutpoints: 3}", "rollout.chain.continuations=2"),
    "tree": (
        "rollout.shape=tree",
        "rollout.tree={branching: [2, 2], normalise: std}",
        "rollout.partition={kind: fixed, tokens: 4}",
    ),
}


def run(folder: Path, shape: str, *overrides: str, resume: bool = False) -> None:
    given = (*SMALL, "supervised.stages=[]", "evaluation.every=0", *ALONE, *LEARNABLE, *SHAPES[shape], *overrides)
    recipe = load_recipe(RECIPE, [f"run.directory={folder}", "checkpoint={every: 1, keep: 3}", *given])
    assert run_rank(recipe, world_from_environment(), Mode(resume=resume)) == 0


def runs(payload: dict) -> None:
    """payload["folder"]/chain, /tree: 2 steps; /resumed: the tree's run, stopped after 1 step, goes on to 2."""
    from dapo_megatron.learner.distributed import leave_world

    leave_world()  # a run forms its own
    folder = Path(payload["folder"])
    run(folder / "chain", "chain", "run.steps=2")
    run(folder / "tree", "tree", "run.steps=2", *SURPLUS)
    run(folder / "resumed", "tree", "run.steps=1", *SURPLUS)
    run(folder / "resumed", "tree", "run.steps=2", *SURPLUS, resume=True)
