"""The recipes of the tasks that tools write: each is sound, and may go on from the warm start that all share."""

import pytest

from dapo_megatron.config import dump_recipe, load_recipe
from dapo_megatron.prepare import check_request
from dapo_megatron.run_directory import claim_run_directory
from tools import programs, programs_task, solvable, solvable_task
from tools.placed_recipes import placed_recipes


@pytest.mark.parametrize(
    ("tool", "task"), [(solvable, solvable_task), (programs, programs_task)], ids=["solvable", "programs"]
)
def test_every_method_goes_on_from_the_warm_start(tool, task, tmp_path):
    task.write_task(tmp_path / "data")
    folder = placed_recipes(tool.RECIPES, tool.METHODS, tmp_path)
    run = [f"run.directory={tmp_path / 'run'}", "run.seed=1"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_recipe(load_recipe(folder / f"{tool.START}.yaml", run)))
    losses = set()
    for method in tool.METHODS:
        recipe = load_recipe(folder / f"{method.recipe}.yaml", run)
        check_request(recipe)
        claim_run_directory(recipe, resume=True, overwrite=False)
        losses.add((recipe.algorithm.policy_loss, recipe.algorithm.advantage, recipe.rollout.shape))
        committed = load_recipe(tool.RECIPES / f"{method.recipe}.yaml")
        assert recipe.algorithm == committed.algorithm and recipe.data.train.startswith(str(tmp_path))
    assert losses == {
        ("dpo", "group", "preferences"),
        ("dpo", "group", "independent"),
        ("clip", "gae", "independent"),
        ("clip", "group", "independent"),
    }
