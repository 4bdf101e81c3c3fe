"""Rules between settings of different sections, and between settings and the model."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dapo_megatron.config.architecture import Architecture
from dapo_megatron.config.recipe import Recipe
from dapo_megatron.config.reward import Judge
from dapo_megatron.config.shape import shape_problems
from dapo_megatron.config.supervised import GENERATED
from dapo_megatron.errors import RequestError

CPU_HEAD_DIMS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)  # of vLLM 0.32's CPU attention


def check_recipe(recipe: Recipe, architecture: Architecture) -> None:
    """Refuse what no single setting shows to be wrong. Sizes that must divide each other are `derive_layout`'s.

    Raises RequestError with every broken rule, one a line: setting, value, rule, nearest value that works.
    """
    problems = [
        *_engine(recipe),
        *_sampling(recipe),
        *fork_problems(recipe),
        *_lengths(recipe, architecture),
        *_overlong(recipe),
        *_judge(recipe),
        *_algorithm(recipe),
        *_reference(recipe),
        *_adaptive_entropy(recipe, architecture),
        *_critic(recipe),
        *shape_problems(recipe),
        *_data(recipe),
        *_stages(recipe),
        *_profile(recipe),
        *_rates(recipe),
        *_home_paths(recipe),
    ]
    if problems:
        raise RequestError("\n".join(problems))


def _profile(recipe: Recipe) -> Iterator[str]:
    profile = recipe.profile
    for name in ("memory", "nvtx"):
        if getattr(profile, name) and recipe.learner.device == "cpu":
            yield f"profile.{name}=true needs a GPU, and learner.device=cpu has none; use false"
    if profile.memory and not profile.steps:
        yield "profile.memory=true records nothing without profile.steps; name some, such as [3]"


def _rates(recipe: Recipe) -> Iterator[str]:
    """A schedule that would rise where it is to fall."""
    stages = enumerate(recipe.supervised.stages)
    for name, part in (("optimizer", recipe.optimizer), *((f"supervised.stages.{i}", stage) for i, stage in stages)):
        if part.schedule != "constant" and part.min_learning_rate > part.learning_rate:
            yield (
                f"{name}.min_learning_rate={part.min_learning_rate:g} exceeds {name}.learning_rate="
                f"{part.learning_rate:g}, from which it is to fall; use {part.learning_rate:g} or less"
            )


def _home_paths(recipe: Recipe) -> Iterator[str]:
    """Paths that only a shell would understand; section slurm's lines are read by one."""
    for name, text in _texts("", recipe.model_dump(exclude={"slurm"})):
        if text.startswith("~/"):
            yield f"{name}={text}: ~ is not expanded here; use {Path(text).expanduser()}"


def _texts(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Dotted names and values of all settings that are text."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(f"{name}.{key}".removeprefix("."), inner)


def profile_problem(recipe: Recipe, world: int) -> str | None:
    """What is wrong with profile.ranks in a world of that many ranks; None if nothing is."""
    beyond = [rank for rank in recipe.profile.ranks if rank >= world]
    if not recipe.profile.steps or not beyond:
        return None
    return f"profile.ranks={recipe.profile.ranks} names rank {beyond[0]} of a world of {world}; use 0..{world - 1}"


def cpu_engine_problem(architecture: Architecture) -> str | None:
    """What keeps vLLM from running `architecture` on a CPU; None if nothing does."""
    if architecture.head_dim in CPU_HEAD_DIMS:
        return None
    return (
        f"rollout.engine=vllm on a CPU has no attention for head_dim={architecture.head_dim}; it has "
        f"{', '.join(map(str, CPU_HEAD_DIMS))}; use rollout.engine=hf"
    )


def _engine(recipe: Recipe) -> Iterator[str]:
    rollout = recipe.rollout
    if rollout.engine == "vllm":
        yield from _vllm(recipe)
        return
    if rollout.placement == "disaggregated":
        yield "rollout.placement=disaggregated needs rollout.engine=vllm; use colocated"
    if rollout.tensor != 1:
        yield f"rollout.tensor={rollout.tensor} is a setting of rollout.engine=vllm; with hf use 1"
    if rollout.engines is not None:
        yield f"rollout.engines={rollout.engines} is a setting of rollout.engine=vllm; with hf use null"
    if rollout.servers:
        yield f"rollout.servers={rollout.servers} is a setting of rollout.engine=vllm; with hf use []"


def _vllm(recipe: Recipe) -> Iterator[str]:
    rollout, transport = recipe.rollout, recipe.resharding.transport
    for address in rollout.servers:
        if not re.fullmatch(r"https?://[^/\s]+:\d+/?", address):
            yield f"rollout.servers: {address!r} is not an address like http://host:8000"
    if rollout.servers and rollout.engines not in (None, len(rollout.servers)):
        yield (
            f"rollout.engines={rollout.engines} differs from the {len(rollout.servers)} rollout.servers; "
            f"use {len(rollout.servers)} or null"
        )
    if rollout.servers and transport in ("shared", "relay"):
        yield (
            f"resharding.transport={transport} needs engines that the run starts on its own machines, and "
            "rollout.servers names others; use group or auto"
        )
    if rollout.placement == "disaggregated" and transport in ("shared", "relay"):
        yield f"resharding.transport={transport} needs rollout.placement=colocated; use transport=group or auto"
    node = recipe.hardware.gpus_per_node
    beside = rollout.placement == "colocated" and not rollout.servers
    if recipe.learner.device != "cpu" and beside and rollout.tensor > node:
        most = max(n for n in range(1, node + 1) if rollout.tensor % n == 0 and node % n == 0)
        yield (
            f"rollout.tensor={rollout.tensor} exceeds hardware.gpus_per_node={node}, and an engine beside the learner "
            f"must not leave its node; use rollout.tensor={most}"
        )


def _sampling(recipe: Recipe) -> Iterator[str]:
    rollout = recipe.rollout
    if rollout.top_p != 1:
        yield (
            f"rollout.top_p={rollout.top_p} is refused for training: the learner could not reproduce "
            "the distribution sampled from; use 1.0 (evaluation.top_p is free)"
        )
    if rollout.temperature <= 0:
        yield (
            f"rollout.temperature={rollout.temperature} must be more than 0: greedily decoded "
            "responses of a group are all alike; use 1.0"
        )


def fork_problems(
    recipe: Recipe, names: tuple[str, str] = ("evaluation.fork_temperature", "evaluation.entropy_threshold")
) -> Iterator[str]:
    """What is wrong with a second temperature for tokens of high entropy; `names`: what the user calls the settings."""
    hot, threshold = recipe.evaluation.fork_temperature, recipe.evaluation.entropy_threshold
    if hot is None and threshold is None:
        return
    if threshold is None:
        yield (
            f"{names[0]}={hot:g} needs {names[1]}, the entropy in nats above which it holds; `dapo-megatron analyze "
            "entropy` tells where the model's top 20 % begin"
        )
    elif hot is None:
        yield f"{names[1]}={threshold:g} would not act without {names[0]}, the temperature above it; give both"
    elif recipe.rollout.engine == "vllm":
        yield (
            f"{names[0]}={hot:g} does not go with engine vllm, which draws a whole response at one temperature; use hf"
        )


def _lengths(recipe: Recipe, architecture: Architecture) -> Iterator[str]:
    prompt, response = recipe.data.max_prompt_length, recipe.rollout.max_response_length
    total = prompt + response
    told = f"data.max_prompt_length={prompt} + rollout.max_response_length={response} = {total} tokens"
    limits = [("positions", architecture.max_positions)]
    if architecture.sliding_window is not None:
        limits.append(("tokens of its sliding window", architecture.sliding_window))
    for what, limit in limits:
        if total > limit:
            yield f"{told} exceed the model's {limit} {what}; use {_shorter(prompt, limit)}"
    budget = recipe.learner.tokens_per_micro_batch
    if total > budget:
        yield f"{told} exceed learner.tokens_per_micro_batch={budget}; use tokens_per_micro_batch={total} or more"


def _shorter(prompt: int, limit: int) -> str:
    if prompt < limit:
        return f"rollout.max_response_length={limit - prompt} or less"
    return f"data.max_prompt_length less than {limit} and a rollout.max_response_length that fits beside it"


def _overlong(recipe: Recipe) -> Iterator[str]:
    overlong, response = recipe.reward.overlong, recipe.rollout.max_response_length
    if overlong.max_length is None:
        return
    if overlong.cache_length > overlong.max_length:
        yield (
            f"reward.overlong.cache_length={overlong.cache_length} exceeds "
            f"reward.overlong.max_length={overlong.max_length}; use {overlong.max_length} or less"
        )
    if overlong.max_length > response:
        yield (
            f"reward.overlong.max_length={overlong.max_length} exceeds rollout.max_response_length={response}, "
            f"so no response would reach it; use {response} or less"
        )


def _judge(recipe: Recipe) -> Iterator[str]:
    reward = recipe.reward
    if reward.method == "judge":
        yield from _judge_engine(reward.judge)
        return
    other = f"reward.grader={reward.grader}" if reward.custom is None else "reward.custom"
    changed = {name: value for name, value in reward.judge.changed().items() if name != "vllm"}
    changed |= {f"vllm.{name}": value for name, value in reward.judge.vllm.changed().items()}
    for name, value in changed.items():
        yield f"reward.judge.{name}={value!r} would not act with {other}; leave it out, or use reward.grader=judge"


def _judge_engine(judge: Judge) -> Iterator[str]:
    if judge.engine == "vllm" and judge.url is not None:
        yield (
            f"reward.judge.engine=vllm starts a server of the run's own, and reward.judge.url={judge.url} names "
            "another; use engine=embedded with it, or url=null"
        )
    if judge.engine == "embedded":
        for name, value in judge.vllm.changed().items():
            yield f"reward.judge.vllm.{name}={value} is a setting of reward.judge.engine=vllm; leave it out"


def _algorithm(recipe: Recipe) -> Iterator[str]:
    algorithm = recipe.algorithm
    if algorithm.eps_dual is not None and algorithm.eps_dual <= 1:
        yield f"algorithm.eps_dual={algorithm.eps_dual} must be more than 1; use 3.0, 10.0 or null"
    if algorithm.kl.coefficient > 0 and algorithm.kl.place == "loss" and algorithm.kl.estimator == "k1":
        yield (
            "algorithm.kl.estimator=k1 in algorithm.kl.place=loss has expected gradient 0 and would hold nothing back; "
            "use estimator=k3 or k2, or place=reward"
        )


def _reference(recipe: Recipe) -> Iterator[str]:
    algorithm, shape = recipe.algorithm, recipe.rollout.shape
    reference = algorithm.reference
    if not algorithm.needs_reference:
        for name, value in reference.changed().items():
            yield (
                f"algorithm.reference.{name}={value} would not act: nothing is measured from the reference with "
                f"algorithm.kl.coefficient=0 and algorithm.policy_loss={algorithm.policy_loss}; leave it out, or use "
                "kl.coefficient=0.01"
            )
        return
    for name, kind in (("every", "periodic"), ("decay", "ema")):
        if reference.kind != kind and name in reference.changed():
            yield (
                f"algorithm.reference.{name}={getattr(reference, name)} is a setting of kind={kind}, and "
                f"algorithm.reference.kind={reference.kind} does not read it; leave it out, or use kind={kind}"
            )
    if shape != "preferences":
        return
    if reference.moves:
        yield (
            f"algorithm.reference.kind={reference.kind} would not act: with rollout.shape=preferences the log-probs of "
            "the whole file are taken from the reference once, before the first step; use kind=fixed, or "
            "rollout.shape=independent"
        )
    if reference.placement == "resident":
        yield (
            "algorithm.reference.placement=resident would keep a second model on the device that "
            "rollout.shape=preferences scores with only once, before the first step; use host"
        )


def _adaptive_entropy(recipe: Recipe, architecture: Architecture) -> Iterator[str]:
    adaptive, coefficient = recipe.algorithm.adaptive_entropy, recipe.algorithm.entropy_coefficient
    if adaptive.target is None:
        for name, value in adaptive.changed().items():
            yield f"algorithm.adaptive_entropy.{name}={value:g} would not act without its target; give both"
        return
    most = math.log(architecture.vocab)
    if adaptive.target >= most:
        yield (
            f"algorithm.adaptive_entropy.target={adaptive.target:g} nats is beyond any entropy over the model's "
            f"{architecture.vocab} tokens, at most {most:.3f}: the coefficient would rise for ever; use 0.2"
        )
    if not 0 <= coefficient <= adaptive.max:
        near = adaptive.max if coefficient > 0 else 0.0
        yield (
            f"algorithm.entropy_coefficient={coefficient:g}, where adaptive_entropy begins, must lie between 0 and "
            f"algorithm.adaptive_entropy.max={adaptive.max:g}; use {near:g}"
        )


def _critic(recipe: Recipe) -> Iterator[str]:
    algorithm, critic, steps = recipe.algorithm, recipe.critic, recipe.run.steps
    if algorithm.advantage != "gae":
        sections = (("critic", critic), ("critic.parallel", critic.parallel), ("algorithm.gae", algorithm.gae))
        for section, settings in sections:
            for name, value in settings.changed().items():
                if value is critic.parallel:
                    continue
                yield (
                    f"{section}.{name}={value} is a setting of algorithm.advantage=gae, and {algorithm.advantage} has "
                    "no critic; remove it, or use advantage=gae"
                )
        return
    if algorithm.compares_pairs:
        yield (
            "algorithm.advantage=gae has no part in algorithm.policy_loss=dpo, which compares responses by their "
            "rewards; use advantage=group"
        )
    if 0 < steps <= critic.warmup_steps:
        yield (
            f"critic.warmup_steps={critic.warmup_steps} leaves none of run.steps={steps} to the policy; "
            f"use {steps - 1} or less"
        )


def _data(recipe: Recipe) -> Iterator[str]:
    if recipe.run.steps > 0 and recipe.data.train is None and recipe.data.generate is None:
        yield f"run.steps={recipe.run.steps} needs prompts; set data.train or data.generate"
    template, generate = recipe.data.prompt_template, recipe.data.generate
    if recipe.reward.method == "code" and generate is not None:
        yield "reward.grader=code needs test cases, and data.generate makes integers; use data.train, or grader=rule"
    if template is not None and generate is not None:
        yield f"data.prompt_template={template!r} does not go with data.generate, whose questions stand alone; use null"


def _stages(recipe: Recipe) -> Iterator[str]:
    """Settings of a file's columns do nothing to a stage whose data the run writes."""
    if recipe.data.generate is None:
        return
    for number, stage in enumerate(recipe.supervised.stages):
        if stage.data not in GENERATED:
            continue
        for name, value in stage.changed().items():
            if name.endswith("_column"):
                yield (
                    f"supervised.stages.{number}.{name}={value!r} would not act on data={stage.data}, which the run "
                    "writes itself; leave it out"
                )
