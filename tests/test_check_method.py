"""`check-method` passes what is the same for every cut, and says in clear words what is not."""

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from dapo_megatron.algorithms.extensions import load_extensions
from dapo_megatron.algorithms.registry import SelectionSettings, register_token_selection, token_selections
from dapo_megatron.check_method import (
    CUTS,
    Outcome,
    check_advantage,
    check_method,
    check_selection,
    gap,
    judge,
    small_recipe,
)
from dapo_megatron.cli import app
from dapo_megatron.config import Recipe
from dapo_megatron.errors import RequestError, RunError
from tests.ranks import ROOT

OWN = """
from dapo_megatron.algorithms.registry import register_advantage, register_policy_loss, register_token_selection

@register_policy_loss("whitened", "advantages whitened over the tokens at hand")
def whitened(tokens):
    return -(tokens.advantages_N - tokens.advantages_N.mean()) * tokens.log_ratio().exp()

@register_policy_loss("sequence", "the mean log-ratio of a sequence, unclipped")
def sequence(tokens):
    return -tokens.advantages_N * tokens.mean_of_sequence(tokens.log_ratio()).exp()

@register_token_selection("lucky", "a random half, and the surest tokens")
def lucky(tokens, settings):
    return (tokens.uniform() < 0.5) | (tokens.logprobs_N > -1.0)

@register_advantage("first", "the first response is the baseline")
def first(group):
    return group.rewards_G - group.rewards_G[0]
"""


@pytest.fixture
def own(tmp_path) -> Path:
    file = tmp_path / "own.py"
    file.write_text(OWN.replace('"whitened"', f'"whitened-{tmp_path.name}"').replace('"first"', f'"{tmp_path.name}"')
                    .replace('"sequence"', f'"sequence-{tmp_path.name}"')
                    .replace('"lucky"', f'"lucky-{tmp_path.name}"'))  # fmt: skip
    return file


def recipe(**algorithm: object) -> Recipe:
    return Recipe.model_validate({"run": {"directory": "out"}, "model": {"path": "hf"}, "algorithm": algorithm})


def test_outcomes_that_differ_are_told_with_the_cut_and_the_numbers():
    same = [Outcome([0.5, -0.1], [2.0, 3.0], 40) for _ in CUTS]
    judge(same, recipe())
    rounding = [*same[:-1], Outcome([0.5 + 1e-6, -0.1], [2.0, 3.00002], 40)]
    judge(rounding, recipe())
    other = [*same[:2], Outcome([0.5, -0.1], [2.0, 3.1], 40), *same[3:]]
    with pytest.raises(RunError) as caught:
        judge(other, recipe(policy_loss="mine"))
    for word in ("algorithm.policy_loss=mine", "not layout-invariant", CUTS[2].name, "3.1", "mean_of_sequence"):
        assert word in str(caught.value)
    with pytest.raises(RunError, match=r"statistics=micro_batch.*use old or current"):
        judge(other, recipe(statistics="micro_batch"))


def test_a_gap_is_relative_and_missing_or_broken_numbers_are_infinitely_far():
    first = Outcome([1.0], [10.0], 5)
    assert gap(Outcome([1.0], [10.1], 5), first) == pytest.approx(0.01)
    assert gap(Outcome([1e-9], [10.0], 5), Outcome([-1e-9], [10.0], 5)) < 1e-6
    for broken in (Outcome([1.0], [10.0], 4), Outcome([], [], 5), Outcome([np.nan], [10.0], 5)):
        assert gap(broken, first) == np.inf


def test_an_advantage_that_depends_on_the_order_is_refused(own):
    load_extensions([str(own)])
    with pytest.raises(RunError, match="depends on the order of the responses"):
        check_advantage(own.parent.name, 4, 1e-6)
    for name in ("group", "group-mean", "leave-one-out"):
        check_advantage(name, 4, 1e-6)


def test_a_selection_that_depends_on_the_order_or_on_the_moment_is_refused():
    register_token_selection("checked-every-other", "")(_every_other)
    with pytest.raises(RunError, match="kind=checked-every-other depends on the order of the responses"):
        check_selection(SelectionSettings("checked-every-other"))
    register_token_selection("checked-dice", "")(_dice)
    with pytest.raises(RunError, match=r"kind=checked-dice chose \d+ of \d+ tokens, then others .*TokenValues.uniform"):
        check_selection(SelectionSettings("checked-dice"))
    register_token_selection("checked-keyed", "")(_keyed)
    for kind in set(token_selections()) - {"checked-every-other", "checked-dice"}:
        if not kind.startswith(("bad-selection", "own-of-tests")):
            check_selection(SelectionSettings(kind, cov_low=0.0))


def _every_other(tokens, settings):
    return np.arange(len(tokens)) % 2 == 0


def _dice(tokens, settings):
    return np.random.default_rng().random(len(tokens)) < 0.5


def _keyed(tokens, settings):
    return (tokens.uniform() < 0.5) & (tokens.positions_N > 1)


def test_the_small_recipe_keeps_the_algorithm():
    asked = recipe(policy_loss="cispo", token_selection={"kind": "clip-cov"}, mini_batch_prompts=32, eps_high=0.5)
    small = small_recipe(asked).algorithm
    assert small == asked.algorithm.model_copy(update={"mini_batch_prompts": 2})


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_a_shape_that_needs_rollouts_is_refused(shape):
    settings = recipe().model_dump() | {"rollout": {"shape": shape, "samples_per_prompt": 8}}
    with pytest.raises(RequestError, match=f"rollout.shape={shape} .* makes none; use independent"):
        check_method(Recipe.model_validate(settings), print)


@pytest.mark.slow
@pytest.mark.distributed
def test_on_real_ranks(own, capfd):
    """A loss of one's own with token selection passes; one that looks at its micro-batch alone does not."""
    base = ["check-method", str(ROOT / "recipes/tiny-arithmetic-cpu.yaml"), f"algorithm.extensions=[{own}]"]
    name = own.parent.name
    chosen = [f"algorithm.token_selection.kind=lucky-{name}", "algorithm.adaptive_entropy.target=9.0"]
    chosen.append("algorithm.entropy_coefficient=0.02")
    sound = CliRunner().invoke(app, [*base, *chosen, f"algorithm.policy_loss=sequence-{name}"])
    assert sound.exit_code == 0, (sound.output, capfd.readouterr().err)
    assert sound.output.count("gradient norm") == len(CUTS) and "DIFFERS" not in sound.output
    broken = CliRunner().invoke(app, [*base, f"algorithm.policy_loss=whitened-{name}"])
    assert isinstance(broken.exception, RunError) and "not layout-invariant" in str(broken.exception)
    assert "tensor parallel 2" in broken.output and "DIFFERS" in broken.output
