"""The recipes that come with the repository are what they say."""

from pathlib import Path

import pytest

from dapo_megatron.config import load_recipe
from dapo_megatron.config.algorithm import Reference
from dapo_megatron.prepare import check_request

RECIPES = Path(__file__).parents[2] / "recipes"


def test_all_load_and_each_writes_where_no_other_does():
    directories = [Path(load_recipe(path).run.directory) for path in RECIPES.rglob("*.yaml")]
    assert len(set(directories)) == len(directories) > 8
    assert {directory.parts[0] for directory in directories} == {"runs"}


def test_naive_grpo_differs_from_its_base_in_the_algorithm_alone():
    naive, base = (load_recipe(RECIPES / name) for name in ("naive-grpo-tiny.yaml", "tiny-arithmetic-cpu.yaml"))
    algorithm = naive.algorithm
    assert (algorithm.eps_low, algorithm.eps_high, algorithm.eps_dual) == (0.2, 0.2, None)
    assert (algorithm.advantage, algorithm.loss_aggregation) == ("group", "sequence-mean")
    assert (algorithm.kl.coefficient, algorithm.kl.place, algorithm.kl.estimator) == (0.04, "loss", "k3")
    assert not algorithm.dynamic_sampling.enabled and not algorithm.overlong_filtering
    assert naive.reward.overlong.max_length is None and algorithm.entropy_coefficient == 0
    assert algorithm.mini_batch_prompts == base.algorithm.mini_batch_prompts
    for section in ("model", "data", "parallel", "supervised", "rollout", "optimizer", "learner", "evaluation"):
        assert getattr(naive, section) == getattr(base, section), section


METHODS = {
    "grpo": {"advantage": "group", "policy_loss": "clip", "loss_aggregation": "sequence-mean", "eps_high": 0.2},
    "dr-grpo": {"advantage": "group-mean", "loss_aggregation": "constant-length"},
    "rloo": {"advantage": "leave-one-out", "policy_loss": "clip", "mini_batch_prompts": 16},
    "gspo": {"policy_loss": "gspo", "loss_aggregation": "sequence-mean", "eps_low": 3e-4, "eps_high": 4e-4},
    "cispo": {"policy_loss": "cispo"},
    "high-entropy": {"policy_loss": "clip"},
    "clip-cov": {"policy_loss": "clip", "eps_low": 1.0, "eps_high": 1.0},
    "adaptive-entropy": {"policy_loss": "clip", "entropy_coefficient": 0.0},
    "kl-cov": {"policy_loss": "kl-cov", "eps_dual": None},
    "ppo": {"advantage": "gae", "policy_loss": "clip", "eps_high": 0.2, "whiten": False},
    "ppo-tricks/whitening": {"advantage": "gae", "whiten": True, "mini_batch_prompts": 32},
    "ppo-tricks/large-batch": {"advantage": "gae", "whiten": True, "mini_batch_prompts": 64},
    "ppo-tricks/ema-reference": {"advantage": "gae", "whiten": True, "reference": Reference(kind="ema", decay=0.9)},
    "ppo-tricks/too-small-batch": {"advantage": "gae", "whiten": True, "mini_batch_prompts": 4},
    "supervised": {"advantage": "group"},
    "dpo": {"policy_loss": "dpo", "mini_batch_prompts": 16},
    "iterative-dpo": {"policy_loss": "dpo", "statistics": "current"},
    "spo-chain": {"policy_loss": "clip", "eps_high": 0.2},
    "spo-chain-2": {"policy_loss": "clip", "eps_high": 0.2},
    "spo-chain-8": {"policy_loss": "clip", "eps_high": 0.2},
    "spo-tree": {"policy_loss": "clip", "eps_high": 0.2},
}
ELSEWHERE = {"judge", "judge-distil"}  # tests/test_judge_pipeline.py
TASKS = {"solvable", "programs"}  # folders; their data come from a tool: tests/tools/test_placed_recipes.py


def test_every_method_has_its_recipe():
    folder = RECIPES / "methods"
    names = {path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml")}
    assert {name for name in names if name.split("/")[0] not in TASKS} == {*METHODS, *ELSEWHERE, "base"}


def test_too_small_batches_see_as_many_responses_as_those_they_are_compared_with():
    small, large = (
        load_recipe(RECIPES / "methods" / "ppo-tricks" / f"{n}.yaml") for n in ("too-small-batch", "whitening")
    )
    drawn = [recipe.run.steps * recipe.rollout.prompts_per_step for recipe in (small, large)]
    alone = [recipe.critic.warmup_steps * recipe.rollout.prompts_per_step for recipe in (small, large)]
    assert drawn[0] == drawn[1] and alone[0] == alone[1] and small.optimizer == large.optimizer


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_recipe_would_be_accepted_and_is_what_it_says(name):
    recipe = load_recipe(RECIPES / "methods" / f"{name}.yaml")
    _, layout = check_request(recipe)
    assert layout.world == 1
    for key, value in METHODS[name].items():
        assert getattr(recipe.algorithm, key) == value, key
    kind = "low-probability" if name.startswith("spo") else name if name in ("high-entropy", "clip-cov") else "none"
    assert recipe.algorithm.token_selection.kind == kind
    assert recipe.algorithm.statistics == METHODS[name].get("statistics", "old")
