"""Cells of the comparison: the ladder's task under each method's algorithm, kept and continued as the ladder's are."""

from pathlib import Path

import pytest

from dapo_megatron.config import dump_recipe, load_recipe
from dapo_megatron.errors import RequestError
from dapo_megatron.prepare import check_request
from dapo_megatron.run_directory import claim_run_directory
from tests.tools.test_ladder import SETTINGS, FakeTrain
from tools.compare import COMPARED, DAPO, METHODS, rungs_of, write_recipes, write_warm_recipe
from tools.ladder import run_ladder
from tools.ladder_table import draw_curves, rows_csv, table_markdown


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "recipes"
    write_recipes(rungs_of([]), folder)
    return folder


def test_a_cell_is_the_ladders_recipe_with_the_methods_algorithm(recipes):
    base = load_recipe(DAPO)
    for rung in rungs_of([]):
        recipe, name = load_recipe(recipes / f"{rung.recipe}.yaml"), rung.recipe.partition("-")[2]
        check_request(recipe)
        for section in ("model", "data", "supervised", "optimizer", "learner", "reward"):
            assert getattr(recipe, section) == getattr(base, section), (name, section)
        assert recipe.evaluation.samples == base.evaluation.samples
        assert recipe.rollout.prompts_per_step * recipe.rollout.samples_per_prompt == 256
        assert recipe.rollout.max_response_length == base.rollout.max_response_length
        if name == "dapo":
            assert recipe.algorithm == base.algorithm
            continue
        whole = load_recipe(METHODS / f"{name}.yaml")
        method = whole.algorithm
        assert recipe.algorithm.mini_batch_prompts == {"rloo": 32, "ppo": 32}.get(name, 4)
        assert (recipe.rollout.shape, recipe.rollout.tree) == (whole.rollout.shape, whole.rollout.tree)
        assert recipe.critic == whole.critic
        for key in ("advantage", "policy_loss", "token_selection", "eps_low", "eps_high", "loss_aggregation", "kl_cov"):
            assert getattr(recipe.algorithm, key) == getattr(method, key), (name, key)


def test_every_cell_may_go_on_from_the_warm_start(recipes, tmp_path):
    run = [f"run.directory={tmp_path / 'run'}", "run.seed=1"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(dump_recipe(load_recipe(write_warm_recipe(recipes), run)))
    needing = 0
    for rung in rungs_of([]):
        recipe = load_recipe(recipes / f"{rung.recipe}.yaml", run)
        needing += recipe.algorithm.needs_reference
        claim_run_directory(recipe, resume=True, overwrite=False)
    assert needing == 2  # PPO and iterative DPO


def test_the_warm_start_has_a_recipe_of_its_own(recipes, tmp_path):
    asked = []

    def train(arguments: list[str], log: Path) -> int:
        asked.append(Path(arguments[0]).stem)
        return FakeTrain()(arguments, log)

    warm = write_warm_recipe(recipes)
    run_ladder(tmp_path, [1], SETTINGS, train, jobs=1, rungs=rungs_of(["grpo"]), recipes=recipes, warm=warm)
    assert asked == ["warm", "01-grpo"]


def test_names_choose_cells_in_one_order():
    assert [rung.recipe for rung in rungs_of([])] == [f"{i:02d}-{name}" for i, name in enumerate(COMPARED)]
    assert [rung.recipe for rung in rungs_of(["kl-cov", "dapo"])] == ["00-dapo", "08-kl-cov"]
    with pytest.raises(RequestError, match="--methods kl-kov: not known; did you mean kl-cov"):
        rungs_of(["kl-kov"])


def test_cells_are_kept_and_told_without_a_last_less_first(recipes, tmp_path):
    rungs = rungs_of([])
    cells, failures = run_ladder(tmp_path, [1, 2], SETTINGS, FakeTrain(), jobs=2, rungs=rungs, recipes=recipes)
    assert failures == [] and len(cells) == 2 * len(rungs)
    again = FakeTrain()
    run_ladder(tmp_path, [1, 2], SETTINGS, again, jobs=1, rungs=rungs, recipes=recipes)
    assert again.calls == []
    table = table_markdown(cells, of="method", last_less_first=False)
    assert all(f"| {title} | 2 |" in table for title in COMPARED.values()) and " less " not in table
    assert table.startswith("| method | seeds |")
    assert rows_csv(cells).count("\n") == 1 + 3 * len(cells)
    draw_curves(cells, tmp_path / "compare.png")
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG")
