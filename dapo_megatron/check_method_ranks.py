"""The ranks of `check-method`: `python -m dapo_megatron.check_method_ranks FOLDER` in a world of `check_method`.

FOLDER holds recipe.yaml, cuts.json and a tiny model; rank 0 adds outcomes.json.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np

from dapo_megatron.algorithms.extensions import load_extensions
from dapo_megatron.check_method import MINI_BATCH, PROMPTS, RESPONSE, TIME_LIMIT_S, VOCABULARY, Cut, Outcome
from dapo_megatron.config import Recipe, derive_layout, load_recipe, read_architecture
from dapo_megatron.data.completions import Completion, PromptGroup
from dapo_megatron.errors import RunError, exit_with_message
from dapo_megatron.launch import world_from_environment

PROMPT = 4  # tokens
MOVED = 0.4  # nats by which old and reference log-probs are away from the present ones, standard deviation


def main(folder: Path) -> None:
    """Every cut of cuts.json, on this rank."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch is imported
    import torch

    from dapo_megatron.learner.distributed import join_world, leave_world

    world = world_from_environment()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(TIME_LIMIT_S)  # a method may not come back
    torch.set_num_threads(1)
    recipe = load_recipe(folder / "recipe.yaml")
    load_extensions(recipe.algorithm.extensions)
    join_world(world, device=torch.device("cpu"), time_limit_s=TIME_LIMIT_S)
    try:
        cuts = [Cut(**cut) for cut in json.loads((folder / "cuts.json").read_text())]
        found = [_outcome(recipe, cut, folder) for cut in cuts]
    finally:
        leave_world()
    if world.rank == 0:
        (folder / "outcomes.json").write_text(json.dumps([vars(outcome) for outcome in found]))


def synthetic_groups(recipe: Recipe) -> list[PromptGroup]:
    """PROMPTS groups of random tokens and rewards; in each some responses are right, and its last is truncated."""
    rng, samples = np.random.default_rng(1), recipe.rollout.samples_per_prompt

    def completion(ticket: int) -> Completion:
        tokens = rng.integers(0, VOCABULARY, int(rng.integers(3, RESPONSE))).astype(np.int32)
        reason = "length" if ticket and ticket == samples - 1 else "stop"
        logprobs = rng.normal(-2, 1, len(tokens)).astype(np.float32)
        return Completion(ticket, tokens, logprobs, reason, np.zeros(len(tokens), np.int32))

    def group(number: int) -> PromptGroup:
        right = np.arange(samples) <= rng.integers(0, max(1, samples - 1))
        return PromptGroup(
            number, "", "", rng.integers(0, VOCABULARY, PROMPT).astype(np.int32),
            [completion(j) for j in range(samples)], accuracies=right,
            rewards=(2.0 * right - 1 + 0.1 * rng.normal(size=samples)).astype(np.float32),
        )  # fmt: skip

    return [group(number) for number in range(PROMPTS)]


def _outcome(recipe: Recipe, cut: Cut, folder: Path) -> Outcome:
    from dapo_megatron.assemble import build_learner
    from dapo_megatron.learner.parallel_groups import form_groups
    from dapo_megatron.policy_step import learn_step

    groups = synthetic_groups(recipe)
    tokens = sum(PROMPT + len(c.tokens) for g in groups[:MINI_BATCH] for c in g.completions)
    budget = max(PROMPT + RESPONSE, int(cut.share * tokens) if cut.share < 1 else PROMPTS * tokens)
    changed = recipe.model_dump()
    changed["parallel"] |= {"tensor": cut.tensor, "pipeline": cut.pipeline, "context": cut.context}
    changed["learner"] |= {"tokens_per_micro_batch": budget}
    cut_recipe = Recipe.model_validate(changed)
    architecture = read_architecture(folder)
    layout = derive_layout(cut_recipe, architecture, cut.world)
    form_groups(layout, seed=0, time_limit_s=TIME_LIMIT_S)
    import torch

    learner = build_learner(cut_recipe, architecture, layout, torch.device("cpu"), folder)
    _give_logprobs(learner, groups, recipe, folder / "logprobs.safetensors")
    if cut.backwards:
        groups = [g for i in range(0, PROMPTS, MINI_BATCH) for g in reversed(groups[i : i + MINI_BATCH])]
    losses: list[float] = []
    norms: list[float] = []
    gradients, step = learner.gradients, learner.step

    def noted_gradients(*arguments):
        sums = gradients(*arguments)
        losses.append(float(sums[0]))
        return sums

    def noted_step(*arguments):
        norms.append(step(*arguments))
        return norms[-1]

    learner.gradients, learner.step = noted_gradients, noted_step
    result = learn_step(learner, groups, cut_recipe, learning_rate=0.0, step=1)
    return Outcome(losses, norms, result.trained_tokens)


def _give_logprobs(learner, groups: list[PromptGroup], recipe: Recipe, file: Path) -> None:
    """Old and reference log-probs and entropies of the groups: made once, by the first cut, then the same for all."""
    from safetensors.numpy import load_file, save_file

    from dapo_megatron.policy_step import score_old_policy

    names = ("old_logprobs", "reference_logprobs", "entropies")
    if not file.exists():  # the first cut is alone in its world
        rng = np.random.default_rng(2)
        score_old_policy(learner, groups, recipe.algorithm)
        arrays = {}
        for g, group in enumerate(groups):
            group.reference_logprobs = [_moved(rng, values) for values in group.old_logprobs]
            group.old_logprobs = [_moved(rng, values) for values in group.old_logprobs]
            arrays |= {f"{n}.{g}.{i}": values for n in names for i, values in enumerate(getattr(group, n))}
        save_file(arrays, file)
    arrays = load_file(file)
    for g, group in enumerate(groups):
        for name in names:
            setattr(group, name, [arrays[f"{name}.{g}.{i}"] for i in range(len(group.completions))])


def _moved(rng: np.random.Generator, values: np.ndarray) -> np.ndarray:
    return (values + MOVED * rng.normal(size=len(values))).astype(np.float32)


def _too_long(_number: int, _frame: object) -> None:
    raise RunError(f"the method did not come back within {TIME_LIMIT_S} s")


if __name__ == "__main__":
    with exit_with_message():
        main(Path(sys.argv[1]))
