"""What a recipe's algorithm may be made of: names, files of the user's, combinations that make no sense."""

import subprocess
import sys
from typing import get_args

import numpy as np
import pytest

from dapo_megatron.algorithms.advantage_rules import advantages_of
from dapo_megatron.algorithms.extensions import load_extensions
from dapo_megatron.algorithms.registry import (
    GroupRewards,
    SelectionSettings,
    TokenValues,
    policy_losses,
    register_policy_loss,
)
from dapo_megatron.algorithms.token_selection import kept_tokens
from dapo_megatron.config import Recipe
from dapo_megatron.config.algorithm import Reference
from dapo_megatron.config.reward import Reward
from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.methods import REFERENCES, check_methods, list_methods, selection_settings
from dapo_megatron.rewards.grader import GRADERS
from tests.ranks import ROOT

OWN = """
import numpy as np
from dapo_megatron.algorithms.registry import register_advantage, register_policy_loss

@register_advantage("{name}-best", "R minus the best of the others", least_samples={least})
def best(group):
    return group.rewards_G - group.rewards_G.max()

@register_policy_loss("{name}-plain", "no ratio at all")
def plain(tokens):
    return -tokens.advantages_N * tokens.logprobs_N
"""


def recipe(samples: int = 8, extensions: tuple = (), **algorithm: object) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"directory": "out"},
            "model": {"path": "hf"},
            "rollout": {"samples_per_prompt": samples},
            "algorithm": {"extensions": [str(file) for file in extensions], **algorithm},
        }
    )


def refusal(*arguments: object, **settings: object) -> str:
    with pytest.raises(RequestError) as caught:
        check_methods(recipe(*arguments, **settings))
    return str(caught.value)


@pytest.mark.parametrize(
    "algorithm",
    [
        {},
        {"advantage": "group-mean", "loss_aggregation": "constant-length", "eps_dual": 3.0},
        {"advantage": "leave-one-out", "policy_loss": "cispo"},
        {"policy_loss": "gspo", "loss_aggregation": "sequence-mean"},
        {"policy_loss": "kl-cov", "token_selection": {"kind": "high-entropy"}, "statistics": "current"},
        {"token_selection": {"kind": "clip-cov"}, "statistics": "micro_batch", "eps_dual": 3.0},
    ],
)
def test_what_goes_together(algorithm):
    check_methods(recipe(**algorithm))


@pytest.mark.parametrize(
    ("samples", "algorithm", "words"),
    [
        (
            8,
            {"advantage": "gruop"},
            ["advantage=gruop", "did you mean group?", "leave-one-out", "extensions"],
        ),
        (8, {"policy_loss": "xyz"}, ["algorithm.policy_loss=xyz", "clip", "gspo", "cispo"]),
        (1, {}, ["rollout.samples_per_prompt=1", "algorithm.advantage=group", "use 2 or more"]),
        (1, {"advantage": "leave-one-out"}, ["rollout.samples_per_prompt=1", "use 2 or more"]),
        (8, {"policy_loss": "gspo"}, ["algorithm.loss_aggregation=token-mean", "gspo", "use sequence-mean"]),
        (8, {"policy_loss": "cispo", "eps_dual": 3.0}, ["algorithm.eps_dual=3.0", "cispo", "use null", "clip"]),
        (8, {"policy_loss": "kl-cov", "eps_dual": 3.0}, ["algorithm.eps_dual=3.0", "kl-cov", "use null"]),
        (8, {"policy_loss": "kl-cov", "token_selection": {"kind": "clip-cov"}}, ["clip-cov", "kl-cov", "one of"]),
        (8, {"token_selection": {"kind": "clip-cov", "cov_low": 5.0}}, ["cov_low=5.0", "cov_high=5.0", "use 1.0"]),
        (
            8,
            {"policy_loss": "gspo", "loss_aggregation": "sequence-mean", "token_selection": {"kind": "high-entropy"}},
            ["token_selection.kind=high-entropy", "gspo", "use policy_loss=clip, or kind=none"],
        ),
        (8, {"dpo": {"beta": 0.5}}, ["algorithm.dpo is a section of algorithm.policy_loss=dpo", "leave it out"]),
        (8, {"cispo": {"lower_clip": True}}, ["algorithm.cispo is a section", "policy_loss=clip leave it out"]),
        (8, {"statistics": "current"}, ["algorithm.statistics=current", "token_selection", "use old"]),
    ],
)
def test_refused_with_the_reason(samples, algorithm, words):
    told = refusal(samples, **algorithm)
    assert all(word in told for word in words), told
    assert "\n" not in told


def test_files_of_the_user_are_loaded_before_names_are_checked(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN.format(name="mine", least=1))
    # one response a prompt is this rule's own business, but no such group is ever mixed
    settings = {"extensions": (file,), "advantage": "mine-best", "policy_loss": "mine-plain"}
    assert "dynamic_sampling" in refusal(1, **settings)
    check_methods(recipe(1, **settings, dynamic_sampling={"enabled": False}))
    assert "mine-plain" in list_methods() and "no ratio at all" in list_methods()
    rewards = GroupRewards(np.array([1.0, 3.0]), np.array([4, 4]), 0.0)
    np.testing.assert_array_equal(advantages_of("mine-best", rewards), [-2.0, 0.0])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, ["nothing.py", "is not a Python file"]),
        ("def f(:\n", ["line 1", "not valid Python"]),
        ("import no_such_module_at_all\n", ["cannot be imported", "no_such_module_at_all"]),
        ("raise SystemExit(3)\n", ["cannot be imported", "SystemExit"]),
        ("x = 1\n", ["registers nothing", "@register_advantage"]),
        (OWN.format(name="late", least=2).replace("late-plain", "clip"), ["'clip' is registered already"]),
        (OWN.format(name="agg", least=2).replace('at all"', "at all\", aggregations=('mean',)"), ["'mean'"]),
    ],
)
def test_files_that_cannot_be_used(tmp_path, text, words):
    file = tmp_path / "nothing.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(RequestError) as caught:
        load_extensions([str(file)])
    assert all(word in str(caught.value) for word in ["algorithm.extensions", *words]), caught.value
    with pytest.raises(RequestError):  # a second time too
        load_extensions([str(file)])


def test_a_name_is_registered_once():
    register_policy_loss("once", "first")(_first)
    register_policy_loss("once", "first")(_first)  # a file that is run twice
    with pytest.raises(RequestError, match="'once' is registered already"):
        register_policy_loss("once", "second")(_second)
    assert policy_losses()["once"].compute is _first


def _first(tokens): ...


def _second(tokens): ...


@pytest.mark.parametrize("answer", ["raise KeyError('x')", "return [1.0]", "return [float('nan')] * 2"])
def test_an_advantage_must_be_one_finite_number_a_response(tmp_path, answer):
    name = f"bad-{len(answer)}"
    file = tmp_path / "bad.py"
    file.write_text(
        "from dapo_megatron.algorithms.registry import register_advantage\n"
        f"@register_advantage('{name}', '')\ndef bad(group):\n    {answer}\n"
    )
    load_extensions([str(file)])
    where = " at bad.py:4 " if "raise" in answer else "one finite number a response"
    with pytest.raises(RunError, match=f"algorithm.advantage={name} .*{where}"):
        advantages_of(name, GroupRewards(np.array([1.0, 2.0]), np.array([3, 3]), 0.0))


OWN_SELECTION = """
from dapo_megatron.algorithms.registry import register_token_selection

@register_token_selection("{name}", "tokens in a lucky half")
def mine(tokens, settings):
    {body}
"""


def test_an_own_token_selection(tmp_path):
    file = tmp_path / "selection.py"
    file.write_text(OWN_SELECTION.format(name="lucky", body="return tokens.uniform() < settings.ratio"))
    algorithm = {"extensions": (file,), "token_selection": {"kind": "lucky", "ratio": 0.5}}
    check_methods(recipe(**algorithm))
    assert "  lucky           tokens in a lucky half" in list_methods()
    whole = refusal(8, **algorithm, policy_loss="gspo", loss_aggregation="sequence-mean")
    assert "token_selection.kind=lucky" in whole and "gspo" in whole
    told = refusal(8, token_selection={"kind": "luky"})
    assert all(word in told for word in ("algorithm.token_selection.kind=luky", "did you mean lucky?", "high-entropy"))
    values = token_values(400)
    chosen = selection_settings(recipe(**algorithm).algorithm)
    kept = kept_tokens(values, chosen, (0, 1, 2))
    assert 150 < kept.sum() < 250
    assert (kept_tokens(values, chosen, (0, 1, 3)) != kept).any()
    assert kept_tokens(values.only(np.zeros(0, int)), chosen, (0, 1, 2)).shape == (0,)


def token_values(count: int) -> TokenValues:
    numbers = np.random.default_rng(0).exponential(1, (3, count)).astype(np.float32)
    return TokenValues(
        -numbers[0], numbers[1], numbers[2], np.zeros(count, bool), np.zeros(count, int), np.arange(count)
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("raise KeyError('x')", r"raised KeyError\('x'\) at bad.py:6"),
        ("return tokens.entropies_N", r"returned float32 \[9\] for 9 tokens; it must return one bool a token"),
        ("return tokens.entropies_N[:2] > 0", r"returned bool \[2\]"),
    ],
)
def test_an_own_selection_must_say_yes_or_no_to_each_token(tmp_path, body, said):
    name, file = f"bad-selection-{len(body)}", tmp_path / "bad.py"
    file.write_text(OWN_SELECTION.format(name=name, body=body))
    load_extensions([str(file)])
    with pytest.raises(RunError, match=f"algorithm.token_selection.kind={name} {said}"):
        kept_tokens(token_values(9), SelectionSettings(name), (0, 0, 0))


@pytest.mark.parametrize("seed", range(5))
def test_leave_one_out_subtracts_the_mean_of_the_others(seed):
    rewards = np.random.default_rng(seed).normal(size=5)
    expected = [r - np.mean(np.delete(rewards, i)) for i, r in enumerate(rewards)]
    found = advantages_of("leave-one-out", GroupRewards(rewards, np.full(5, 3), 1e-6))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert not advantages_of("leave-one-out", GroupRewards(np.full(5, 0.3), np.full(5, 3), 1e-6)).any()


def test_names_are_checked_without_torch():
    code = (
        "import sys; from dapo_megatron.methods import list_methods; text = list_methods(); "
        "assert 'torch' not in sys.modules; print(text)"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert told.returncode == 0, told.stderr
    for name in (
        "group",
        "leave-one-out",
        "clip",
        "gspo",
        "cispo",
        "kl-cov",
        "judge",
        "high-entropy",
        "clip-cov",
        "micro_batch",
        "chain",
        "tree",
    ):
        assert f"  {name} " in told.stdout


def pairs_recipe(*, shape: str = "independent", samples: int = 8, prompts: int = 32, **algorithm: object) -> Recipe:
    own = {"policy_loss": "dpo", "mini_batch_prompts": 32, "dynamic_sampling": {"keep_surplus": False}}
    rollout = {"shape": shape, "samples_per_prompt": samples, "prompts_per_step": prompts}
    return Recipe.model_validate(
        {"run": {"directory": "out"}, "model": {"path": "hf"}, "rollout": rollout, "algorithm": own | algorithm}
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shape": "preferences", "samples": 2},
        {"statistics": "current", "prompts": 512, "dynamic_sampling": {}},
        {"dpo": {"beta": 0.3}},
    ],
)
def test_pairs_that_go_together(settings):
    check_methods(pairs_recipe(**settings))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"shape": "preferences", "samples": 2, "policy_loss": "clip"}, "learns from responses that the policy drew"),
        ({"shape": "preferences", "samples": 8}, "samples_per_prompt=8, and a row .* has two responses; use 2"),
        ({"samples": 1}, "samples_per_prompt=1 makes no pair"),
        ({"kl": {"coefficient": 0.1}}, r"kl.coefficient=0.1 does not go with .*=dpo.* use 0.0"),
        ({"token_selection": {"kind": "high-entropy"}}, "token_selection.kind=high-entropy does not go with"),
        ({"whiten": True}, "whiten=true does not go with .* use false"),
        ({"adaptive_entropy": {"target": 0.2}}, r"adaptive_entropy.target=0\.2 does not go with .* use null"),
        ({"entropy_coefficient": 0.01}, "entropy_coefficient=0.01 does not go with .* use 0.0"),
        ({"advantage": "leave-one-out"}, "advantage=leave-one-out would not act: .*; use group"),
        ({"loss_aggregation": "sequence-mean"}, "loss_aggregation=sequence-mean would not act: .*; use token-mean"),
        ({"kl_cov": {"beta": 2.0}}, "algorithm.kl_cov is a section of .*=kl-cov; with policy_loss=dpo leave it out"),
        ({"importance_bound": 2.0}, "importance_bound=2.0 does not go with .* use null"),
        ({"statistics": "micro_batch"}, "micro_batch means nothing to .*=dpo; use current"),
        ({"prompts": 64}, "in the first of 2 updates alone; use statistics=current, or mini_batch_prompts=64"),
        ({"dynamic_sampling": {}}, "an older policy's log-probs; use statistics=current, or keep_surplus=false"),
    ],
)
def test_pairs_that_make_no_sense(settings, told):
    with pytest.raises(RequestError, match=told):
        check_methods(pairs_recipe(**settings))


def test_every_grader_is_listed():
    assert set(GRADERS) == set(get_args(Reward.model_fields["grader"].annotation))
    assert all(f"  {name:<15} {told}" in list_methods() for name, told in GRADERS.items())


def test_every_kind_of_reference_is_listed():
    assert set(REFERENCES) == set(get_args(Reference.model_fields["kind"].annotation))
    assert all(f"  {name:<15} {told}" in list_methods() for name, told in REFERENCES.items())
