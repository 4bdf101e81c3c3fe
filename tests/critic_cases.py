"""Run on ranks: PPO steps of a policy and a critic that are cut differently over the same ranks."""

from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from dapo_megatron.config import Recipe
from dapo_megatron.config.checkpoint import Checkpoint
from dapo_megatron.config.optimizer import Optimizer
from dapo_megatron.config.resharding import Resharding
from dapo_megatron.critic_step import critic_step, estimate
from dapo_megatron.learner.checkpoint import load_checkpoint
from dapo_megatron.learner.checkpoint_files import random_states_file
from dapo_megatron.learner.checkpoint_saver import CheckpointSaver
from dapo_megatron.learner.critic import copy_decoder
from dapo_megatron.learner.learner import Learner
from dapo_megatron.learner.manifest import CRITIC, POLICY, UPDATES, checkpoint_folder
from dapo_megatron.learner.parallel_groups import GLOBALS
from dapo_megatron.learner.random_states import read_random_states, restore_random_states, take_random_states
from dapo_megatron.learner.snapshot import HostMemory, take_snapshot
from dapo_megatron.policy_step import learn_step, score_old_policy
from dapo_megatron.resharding.hf_layout import VALUE_HEAD
from tests.learner.layouts import build
from tests.learner.update_cases import save_whole
from tests.random_groups import random_groups

RATE = 1e-3
# a large epsilon: Adam would blow rounding noise in a small gradient up to a full step
OPTIMIZER = Optimizer(learning_rate=RATE, weight_decay=0.1, epsilon=1e-2)
RECIPE = Recipe.model_validate(
    {
        "run": {"directory": "out"},
        "model": {"path": "hf"},
        "algorithm": {"advantage": "gae", "mini_batch_prompts": 2, "whiten": True},
        "critic": {"epochs": 2, "learning_rate": RATE},
        "optimizer": {"weight_decay": 0.1},
    }
)


def ppo_steps(payload: dict) -> dict[str, dict]:
    """For each "policy critic" of layouts two rollout steps: the numbers of both and the values of the second; all
    weights after them go to files. With "save" the second step once more, from a checkpoint of the first."""
    found = {}
    for policy_layout, critic_layout in payload["layouts"]:
        policy, critic = _pair(payload, policy_layout, critic_layout)
        name = f"{policy_layout} {critic_layout}"
        found[name] = {"steps": [_step(policy, critic, 1)], "own groups": critic.groups is not policy.groups}
        if name == payload.get("save"):
            found[name] |= _saved_and_resumed(payload, (policy, critic), (policy_layout, critic_layout))
        else:
            found[name]["steps"].append(_step(policy, critic, 2))
        for part, learner in (("policy", policy), ("critic", critic)):
            save_whole(learner, learner.weights, Path(payload["out"]) / f"{name} {part}")
    return found


def _pair(payload: dict, policy_layout: str, critic_layout: str, *, resumed: bool = False) -> tuple[Learner, Learner]:
    """A policy, and a critic with its decoder and the head of its own folder."""
    policy = build(payload["policy"], policy_layout, budget=100, train=OPTIMIZER, temperature=0.9)
    critic = build(payload["critic"], critic_layout, budget=100, train=OPTIMIZER, critic=True, beside=True)
    if not resumed:
        head = {p.key for p in critic.weight_layout.placements[dist.get_rank()] if p.name in VALUE_HEAD}
        for key, weight in critic.weights.items():
            if key not in head:
                weight.fill_(float("nan"))
        copy_decoder(policy, critic, Resharding())
    return policy, critic


def _step(policy: Learner, critic: Learner, seed: int) -> dict:
    groups = random_groups(seed, 4, lengths=(3, 20), rewards=lambda rng: rng.normal(size=3))
    score_old_policy(policy, groups, RECIPE.algorithm)
    estimates = estimate(critic, groups, RECIPE)
    step = learn_step(policy, groups, RECIPE, learning_rate=RATE, estimates=estimates.advantages)
    own = critic_step(critic, estimates, RECIPE)
    return {
        "values": np.concatenate(estimates.batch.old_values).tolist(),
        "policy": [step.loss, step.grad_norm, step.ratio, step.tokens.entropy],
        "critic": [own.loss, own.grad_norm, own.value, own.target, own.explained_variance],
    }


def _saved_and_resumed(payload: dict, pair: tuple[Learner, Learner], layouts: tuple[str, str]) -> dict:
    """A second step beside the saving of the first; then both learners anew, and the same step from the checkpoint."""
    (policy, critic), out = pair, Path(payload["out"])
    for learner in pair:
        build_state = take_snapshot(learner, HostMemory())
        present = {name: getattr(parallel_state, name) for name in GLOBALS}
        vars(parallel_state).update(dict.fromkeys(GLOBALS))
        build_state()  # a thread saves while any groups are in force
        vars(parallel_state).update(present)
    save_whole(critic, critic.weights, out / "saved critic")
    folders = {"side_files": Path(payload["policy"]), "critic_files": Path(payload["critic"])}
    saver = CheckpointSaver(Checkpoint(), policy, out, critic=critic, **folders)
    saver.save({"step": 1, UPDATES[POLICY]: 2, UPDATES[CRITIC]: 4, "best": None})
    second = _step(policy, critic, 2)
    saver.wait()
    folder = checkpoint_folder(out, 1)
    again = _pair(payload, *layouts, resumed=True)
    for part, learner in zip((POLICY, CRITIC), again, strict=True):
        load_checkpoint(folder, learner, part)
    third = _step(*again, 2)
    twins = zip(again, pair, strict=True)
    exact = all(torch.equal(weight, old.weights[key]) for new, old in twins for key, weight in new.weights.items())
    trackers = {POLICY: again[0].groups, CRITIC: again[1].groups}
    states = take_random_states(policy.device, trackers)
    for groups in trackers.values():
        with groups.in_force():
            get_cuda_rng_tracker().set_states({})
    restore_random_states(read_random_states(random_states_file(folder, dist.get_rank())), policy.device, trackers)
    restored = take_random_states(policy.device, trackers).tensors
    tracked = [key for key in states.tensors if "megatron." in key]
    seeds = [all(torch.equal(restored[key], states.tensors[key]) for key in tracked), len(tracked)]
    seeds.append(
        not torch.equal(restored["megatron.model-parallel-rng"], restored["critic.megatron.model-parallel-rng"])
    )
    told: list = [None] * dist.get_world_size()
    dist.all_gather_object(told, (exact, seeds))
    return {"steps": [None, second], "resumed": third, "exact": [e for e, _ in told], "seeds": [s for _, s in told]}
