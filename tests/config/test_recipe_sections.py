"""Sections: every setting is documented, defaults are the published ones, types are strict."""

from collections.abc import Iterator
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from dapo_megatron.config import Recipe
from dapo_megatron.config.problems import known_names
from dapo_megatron.config.section import Section

LEAST = {"run": {"directory": "out"}, "model": {"path": "hf"}}
SCRATCH = {"hidden": 8, "layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 2, "ffn": 8}


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    """A section and those nested in it, or those named in a union, a list or a mapping."""
    for inner in get_args(annotation):
        yield from sections_in(inner)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
        for field in annotation.model_fields.values():
            yield from sections_in(field.annotation)


def test_every_setting_has_a_docstring():
    sections = set(sections_in(Recipe))
    assert sections == {written for written in Section.__subclasses__() if written.__module__.startswith("dapo_")}
    undocumented = [
        f"{section.__name__}.{name}"
        for section in sections
        for name, field in section.model_fields.items()
        if not field.description
    ]
    assert undocumented == []


def test_the_names_outside_scripts_rely_on():
    promised = {
        "run": "steps directory seed",
        "model": "path",
        "data": "train validation",
        "parallel": "tensor pipeline virtual_pipeline context sequence",
        "optimizer": "learning_rate warmup_rollout_steps weight_decay",
        "algorithm": "eps_low eps_high eps_dual mini_batch_prompts loss_aggregation overlong_filtering",
        "algorithm.kl": "coefficient place estimator",
        "algorithm.dynamic_sampling": "enabled max_waves over_sampling adaptive keep_surplus max_age metric",
        "reward.overlong": "max_length cache_length",
        "rollout": "engine placement tensor engines samples_per_prompt prompts_per_step max_response_length "
        "temperature top_p",
        "learner": "tokens_per_micro_batch",
        "evaluation": "samples temperature top_p every",
    }
    names = {f"{section}.{name}" for section, names in promised.items() for name in names.split()}
    assert names - set(known_names(Recipe)) == set()


def test_defaults_are_those_of_the_paper():
    recipe = Recipe.model_validate(LEAST)
    assert (recipe.rollout.prompts_per_step, recipe.rollout.samples_per_prompt) == (512, 16)
    assert (recipe.rollout.temperature, recipe.rollout.top_p) == (1.0, 1.0)
    assert (recipe.algorithm.eps_low, recipe.algorithm.eps_high, recipe.algorithm.eps_dual) == (0.2, 0.28, None)
    assert recipe.algorithm.kl.coefficient == 0
    assert recipe.algorithm.mini_batch_prompts * 16 == 512  # 16 updates of 512 responses
    assert (recipe.optimizer.learning_rate, recipe.optimizer.warmup_rollout_steps) == (1e-6, 20)
    assert (recipe.reward.right, recipe.reward.wrong) == (1.0, -1.0)
    assert recipe.evaluation.top_p == 0.7


def test_an_integer_is_a_float_but_nothing_else_is_converted():
    recipe = Recipe.model_validate(LEAST | {"optimizer": {"learning_rate": 1}})
    assert recipe.optimizer.learning_rate == 1.0
    assert isinstance(recipe.optimizer.learning_rate, float)
    for wrong in (
        {"optimizer": {"learning_rate": "1"}},
        {"optimizer": {"learning_rate": True}},
        {"optimizer": {"learning_rate": float("nan")}},
        {"parallel": {"tensor": "2"}},
        {"parallel": {"tensor": 2.0}},
        {"parallel": {"tensor": True}},
        {"parallel": {"sequence": 1}},
        {"parallel": {"sequence": "true"}},
        {"data": {"train": 3}},
    ):
        with pytest.raises(ValidationError):
            Recipe.model_validate(LEAST | wrong)


def test_a_recipe_does_not_change():
    recipe = Recipe.model_validate(LEAST)
    with pytest.raises(ValidationError):
        recipe.run.steps = 3
    with pytest.raises(ValidationError):
        recipe.run = recipe.run


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({}, ["neither path nor scratch"]),
        ({"path": "hf", "scratch": SCRATCH}, ["both path and scratch"]),
        ({"scratch": SCRATCH | {"kv_heads": 3}}, ["kv_heads=3", "heads=4", "use kv_heads=2"]),
        ({"scratch": SCRATCH | {"head_dim": 3}}, ["multiple of 2"]),
    ],
)
def test_models_that_cannot_be_built(model, words):
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(LEAST | {"model": model})
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("model", [{"path": "hf"}, {"scratch": SCRATCH}, {"path": None, "scratch": SCRATCH}])
def test_exactly_one_source_of_the_model(model):
    recipe = Recipe.model_validate(LEAST | {"model": model})
    assert (recipe.model.path is None) != (recipe.model.scratch is None)
