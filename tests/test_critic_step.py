"""What a critic's values become, without one: rewards and penalties a token, returns, what counts; refusals."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dapo_megatron.config import Recipe, dump_recipe, load_recipe
from dapo_megatron.conversion.command import convert
from dapo_megatron.conversion.options import Options
from dapo_megatron.critic_step import critic_step, estimate
from dapo_megatron.errors import RequestError
from dapo_megatron.files import write_text_atomically
from dapo_megatron.learner.manifest import checkpoint_folder, write_manifest
from dapo_megatron.monitoring.step_metrics import critic_metrics
from dapo_megatron.prepare import check_request
from dapo_megatron.run_directory import claim_run_directory
from tests.command_line import RECIPE, SMALL
from tests.policy_step_cases import groups
from tests.ranks import run_ranks
from tests.tiny_models import load_critic, write_critic, write_model


def recipe(**algorithm: object) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"directory": "out"},
            "model": {"path": "hf"},
            "algorithm": {"advantage": "gae", "mini_batch_prompts": 1, **algorithm},
            "critic": {"epochs": 2, "value_clip": None},
        }
    )


class Values:
    """A critic whose values are drawn at random, 0 without a loss weight; remembers its updates."""

    def __init__(self) -> None:
        self.updates: list[tuple[list[int], float]] = []

    def values(self, batch):
        generator = np.random.default_rng(0)
        return [generator.normal(size=len(w)).astype(np.float32) * (w > 0) for w in batch.loss_weights]

    def gradients(self, batch, sequences, loss):
        self.updates.append((list(sequences), float(np.mean([batch.returns[s].mean() for s in sequences]))))
        return torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)

    def step(self, learning_rate, weight_decay):
        return 2.0


def scored(count: int):
    made = groups(0, count)
    generator = np.random.default_rng(1)
    for group in made:
        lengths = [len(c.tokens) for c in group.completions]
        group.old_logprobs, group.reference_logprobs = (
            [generator.normal(size=n).astype(np.float32) for n in lengths] for _ in range(2)
        )
    return made


@pytest.mark.parametrize("kl", [{}, {"coefficient": 0.1, "place": "reward", "estimator": "k1"}])
def test_the_reward_is_at_the_end_and_each_token_is_charged_its_own_divergence(kl):
    made = scored(2)
    found = estimate(Values(), made, recipe(gae={"gamma": 1.0, "lam": 1.0}, overlong_filtering=False, kl=kl))
    completions = [(g, i) for g in made for i in range(3)]
    for (group, i), advantages, returns, values in zip(
        completions, found.advantages, found.batch.returns, found.batch.old_values, strict=True
    ):
        charged = 0.1 * (group.old_logprobs[i] - group.reference_logprobs[i]) if kl else np.zeros(len(returns))
        expected = group.rewards[i] - np.cumsum(charged[::-1].astype(float))[::-1]  # what is still to come
        np.testing.assert_allclose(returns, expected, atol=1e-5)
        np.testing.assert_allclose(advantages, expected - values, atol=1e-5)


def test_a_step_without_an_update_tells_no_means_over_updates():
    """As when the guard skips them all, or when every response is filtered out."""
    made = scored(2)
    metrics = []
    for weight in (1, 0):
        estimates = estimate(Values(), made, recipe(overlong_filtering=False))
        estimates.batch.loss_weights = [weights * weight for weights in estimates.batch.loss_weights]
        found = critic_step(Values(), estimates, recipe())
        metrics.append(critic_metrics(SimpleNamespace(critic=found)))
    updated, idle = metrics
    means = {"critic/loss", "critic/grad_norm", "critic/clip_fraction"}
    assert means <= set(updated) and updated["critic/updates"] == 4 and idle["critic/updates"] == 0
    assert set(idle) >= {"critic/value_mean", "time/critic"} and not means & set(idle)


def test_filtered_responses_are_left_out_and_every_update_is_a_mini_batch():
    made, critic = scored(2), Values()
    found = estimate(critic, made, recipe())
    step = critic_step(critic, found, recipe())
    assert [s for s, _ in critic.updates] == [[0, 1, 2], [3, 4, 5]] * 2 and step.updates == 4
    assert (step.loss, step.grad_norm, step.clipped) == (0.5, 2.0, 0.25)
    kept = [0, 1, 3, 4]  # the last of each group is truncated
    values, returns = (np.concatenate([c[i] for i in kept]) for c in (found.batch.old_values, found.batch.returns))
    assert step.value == pytest.approx(values.mean(), rel=1e-5) and step.target == pytest.approx(
        returns.mean(), rel=1e-5
    )
    assert step.explained_variance == pytest.approx(1 - (returns - values).var() / returns.var(), rel=1e-4)


def test_a_mini_batch_without_a_trained_token_is_skipped():
    made, critic = scored(1), Values()
    group = made[0]
    group.completions = [
        SimpleNamespace(**{**vars(c), "finish_reason": "length"}) for c in group.completions
    ]  # all are filtered
    step = critic_step(critic, estimate(critic, made, recipe()), recipe())
    assert critic.updates == [] and step.updates == 0 and step.loss == 0.0
    assert np.isnan(step.explained_variance)


LAYOUTS = {
    1: [("tp1pp1", "tp1pp1")],
    4: [("tp2pp2", "tp1pp1"), ("tp1pp2vpp2", "tp4pp1sp"), ("tp1pp1", "tp2pp2"), ("tp2pp1sp", "tp2pp1")],
}


@pytest.fixture(scope="module")
def ppo_runs(tmp_path_factory):
    """(what `ppo_steps` found of each pair of layouts, the weights after it)."""
    root = tmp_path_factory.mktemp("ppo")
    policy = write_model(root / "policy", "qwen2", tied=True)
    payload = {"policy": str(policy), "critic": str(write_critic(root / "critic", policy))}
    runs = {}
    for world, layouts in LAYOUTS.items():
        (root / str(world)).mkdir()
        more = {"out": str(root / str(world)), "layouts": layouts, "save": "tp2pp2 tp1pp1"}
        for name, found in run_ranks(world, "tests.critic_cases:ppo_steps", {**payload, **more}).items():
            paths = [root / str(world) / f"{name} {part}.safetensors" for part in ("policy", "critic")]
            runs[f"{world} {name}"] = (found, [load_file(path) for path in paths])
    before = [load_file(policy / "model.safetensors"), load_file(root / "critic" / "model.safetensors")]
    return runs, before, root / "4"


@pytest.mark.distributed
def test_a_ppo_step_is_the_same_however_policy_and_critic_are_cut(ppo_runs):
    runs, before, _ = ppo_runs
    expected, weights = runs["1 tp1pp1 tp1pp1"]
    assert expected["steps"][0]["critic"][4] != 0 and expected["steps"][0]["policy"][1] > 0
    for case, (found, own) in runs.items():
        assert found["own groups"] == (case.split()[1].removesuffix("sp") != case.split()[2].removesuffix("sp")), case
        for step, wanted in zip(found["steps"], expected["steps"], strict=True):
            for key in ("values", "policy", "critic") if step is not None else ():
                np.testing.assert_allclose(step[key], wanted[key], rtol=2e-5, atol=1e-5, err_msg=f"{case} {key}")
        for tensors, wanted, start in zip(own, weights, before, strict=True):
            assert set(tensors) == set(wanted)
            for name, tensor in tensors.items():
                begun = start.get(name, start.get(name.replace("model.", "", 1)))
                moved = float((wanted[name] - begun).abs().max())
                gap = float((tensor - wanted[name]).abs().max())
                assert moved > 0 and gap <= 1e-3 * moved, (case, name, gap, moved)


@pytest.mark.distributed
def test_a_critic_cut_otherwise_continues_exactly_from_its_checkpoint(ppo_runs):
    found = ppo_runs[0]["4 tp2pp2 tp1pp1"][0]
    assert found["resumed"] == found["steps"][1] and found["exact"] == [True] * 4
    # three tracked generators of each model; the tensor-parallel one is another where the critic's place is another
    assert found["seeds"] == [[True, 6, rank % 2 == 1] for rank in range(4)]


@pytest.mark.distributed
def test_the_critic_of_a_checkpoint_becomes_a_token_classifier(ppo_runs, tmp_path, capsys):
    root = ppo_runs[2]
    checkpoint, critic = checkpoint_folder(root, 1), tmp_path / "critic"
    convert("megatron-to-hf", checkpoint, critic, options=Options(critic=True))
    assert "the critic alone is converted" in capsys.readouterr().out
    found, expected = load_file(critic / "model.safetensors"), load_file(root / "saved critic.safetensors")
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in found)
    read_by_transformers = load_critic(critic).state_dict()
    assert all(torch.equal(read_by_transformers[name], tensor) for name, tensor in expected.items())
    convert("megatron-to-hf", checkpoint, tmp_path / "policy")
    assert "the critic is left behind" in capsys.readouterr().out
    assert set(load_file(tmp_path / "policy" / "model.safetensors")) == set(expected) - {"score.weight", "score.bias"}
    shutil.rmtree(checkpoint / "critic")
    write_manifest(checkpoint)
    with pytest.raises(RequestError, match="holds no critic"):
        convert("megatron-to-hf", checkpoint, tmp_path / "none", options=Options(critic=True))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("critics")
    policy = write_model(root / "policy", "qwen2", tied=True, vocab_size=120)
    return {
        "fits": write_critic(root / "fits", policy),
        "policy": policy,
        "small vocabulary": write_model(root / "small", "qwen2", tied=True, vocab_size=10),
        "three heads": write_model(root / "heads", "qwen2", tied=True, vocab_size=120, num_attention_heads=3,
                                   num_key_value_heads=3, hidden_size=48),
        "short": write_model(root / "short", "qwen2", tied=True, vocab_size=120, max_position_embeddings=16),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("critic", "told"),
    [
        ("fits", None),
        ("policy", None),  # a value head that it lacks is 0
        ("nowhere", "does not exist"),
        ("small vocabulary", "has 10 vocabulary rows"),
        ("three heads", "critic.path=.*does not divide 3 attention heads"),
        ("short", "has 16 positions"),
    ],
)
def test_a_critic_of_its_own_is_checked_before_launch(folders, tmp_path, critic, told):
    path = folders.get(critic, tmp_path / "nowhere")
    settings = [f"run.directory={tmp_path / 'run'}", *SMALL, "algorithm.advantage=gae", f"critic.path={path}"]
    settings += ["parallel={tensor: 2}"]
    if told is None:
        check_request(load_recipe(RECIPE, settings))
        return
    with pytest.raises(RequestError, match=told):
        check_request(load_recipe(RECIPE, settings))


def test_how_a_critic_is_cut_is_checked_before_launch(folders, tmp_path):
    settings = [f"run.directory={tmp_path / 'run'}", *SMALL, "algorithm.advantage=gae"]
    own = f"critic.path={folders['three heads']}"
    check_request(load_recipe(RECIPE, [*settings, own, "critic.parallel={tensor: 1, pipeline: 4}"]))
    for more in ([], [own]):
        with pytest.raises(RequestError, match=r"critic.parallel.tensor=3 x .*pipeline=2 = 6 .* world of 4 ranks"):
            check_request(load_recipe(RECIPE, [*settings, *more, "critic.parallel.tensor=3"]))


@pytest.mark.parametrize(
    ("before", "now", "refused"),
    [
        (["algorithm.advantage=gae"], ["algorithm.advantage=gae", "critic.learning_rate=1.0e-6"], False),
        (["algorithm.advantage=gae"], ["algorithm.advantage=gae", "critic.parallel.tensor=1"], False),
        (["algorithm.advantage=gae"], ["algorithm.advantage=group"], False),
        ([], ["algorithm.advantage=gae"], True),
        (["algorithm.advantage=gae"], ["algorithm.advantage=gae", "critic.path=other"], True),
    ],
)
def test_a_resumed_run_gets_no_other_critic(tmp_path, before, now, refused):
    run = tmp_path / "run"
    run.mkdir()
    own = f"run.directory={run}"
    write_text_atomically(run / "config.yaml", dump_recipe(load_recipe(RECIPE, [own, *before])))
    recipe = load_recipe(RECIPE, [own, *now])
    if not refused:
        claim_run_directory(recipe, resume=True, overwrite=False)
        return
    with pytest.raises(RequestError, match="only a new run may begin with another critic"):
        claim_run_directory(recipe, resume=True, overwrite=False)
