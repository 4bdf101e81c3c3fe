"""The recipes that come with the repository are what they say."""

from pathlib import Path

from dapo_megatron.config import load_recipe

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
