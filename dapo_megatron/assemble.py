"""The parts of a run on one rank, put together from a prepared run directory."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dapo_megatron.agreement import done_on_rank_zero
from dapo_megatron.algorithms.extensions import load_extensions
from dapo_megatron.config import Architecture, Layout, Recipe, derive_critic_layout, derive_layout, read_architecture
from dapo_megatron.config.shape import SEGMENTED
from dapo_megatron.data.completions import PromptGroup
from dapo_megatron.data.sampler import PromptSampler
from dapo_megatron.data.tokenizer import load_tokenizer, stop_tokens
from dapo_megatron.engine_assembly import assemble_engines
from dapo_megatron.engine_sync import EngineSync
from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.judge_assembly import JudgeEngine, judged_by_engine
from dapo_megatron.launch import World
from dapo_megatron.learner.checkpoint_saver import CheckpointSaver
from dapo_megatron.learner.distributed import choose_device
from dapo_megatron.learner.learner import Learner
from dapo_megatron.learner.manifest import CRITIC, POLICY
from dapo_megatron.learner.model import DTYPES, choose_layer_spec
from dapo_megatron.learner.offload import OptimizerMemory
from dapo_megatron.learner.parallel_groups import form_groups, form_groups_beside
from dapo_megatron.learner.reference import ReferenceWeights
from dapo_megatron.phases import Phases
from dapo_megatron.prepare import RunPaths, encode_preferences, encode_prompts, planned_critic, run_paths
from dapo_megatron.profiler import Profiler
from dapo_megatron.prompt_files import Side
from dapo_megatron.rewards.grader import Grader
from dapo_megatron.rollout.dispatcher import Dispatcher
from dapo_megatron.rollout.groups import GroupSampler
from dapo_megatron.rollout.preference_pairs import PreferencePairs
from dapo_megatron.rollout.server_dispatcher import ServerDispatcher
from dapo_megatron.rollout.vllm_engines import VLLMEngines
from dapo_megatron.stragglers import Stragglers
from dapo_megatron.update_guard import UpdateGuard
from dapo_megatron.watchdog import Watchdog
from dapo_megatron.weight_sync import WeightSync

GUARDED = ("policy", "critic", "supervised")


@dataclass
class Run:
    """One rank's parts. `grader` lives on rank 0, as does `judge`, where one has an engine of its own; `engines` are
    servers, None with the embedded engine; `reference` is there with a KL term or with DPO, in the model `resident` if
    there is one; `critic` with algorithm.advantage=gae.
    `resumed` is the checkpoint that the run goes on from. `data_lines`: what is to be said about the training
    prompts. `step`, `updates`, `critic_updates`, `supervised_done` say where the run stands; `surplus` are mixed groups
    kept for the next step, `acceptance` is the running share of mixed groups, `best` the step of the best validation
    and its accuracy, `entropy_coefficient` where an adaptive entropy bonus stands, None before its first step; `guards`
    judge the updates of the policy, of a critic and of supervised stages."""

    recipe: Recipe
    paths: RunPaths
    architecture: Architecture
    layout: Layout
    world: World
    device: torch.device
    tokenizer: object
    learner: Learner
    engines: VLLMEngines | None
    sync: WeightSync | EngineSync | None
    grader: Grader | None
    training: GroupSampler | PreferencePairs | None
    validation: GroupSampler | None
    prompt_order: PromptSampler | None
    data_lines: list[str]
    saver: CheckpointSaver
    optimizer_memory: OptimizerMemory
    phases: Phases
    stragglers: Stragglers
    profiler: Profiler
    step: int = 0
    updates: int = 0
    supervised_done: list[int] = field(default_factory=list)
    surplus: list[PromptGroup] = field(default_factory=list)
    acceptance: float = 1.0
    reference: ReferenceWeights | None = None
    resident: Learner | None = None
    resumed: Path | None = None
    critic: Learner | None = None
    critic_updates: int = 0
    best: dict | None = None
    entropy_coefficient: float | None = None
    judge: JudgeEngine | None = None
    watchdog: Watchdog | None = None
    guards: dict[str, UpdateGuard] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.guards = self.guards or {part: UpdateGuard(self.recipe.optimizer.guard, part) for part in GUARDED}

    def begins(self, phase: str) -> None:
        """Progress, for the watchdog."""
        if self.watchdog is not None:
            self.watchdog.beat(f"{phase}, step {self.step}")

    def close(self) -> None:
        """End what runs beside this rank: a checkpoint being written, grader, engines."""
        self.saver.close()
        if self.sync is not None:
            self.sync.close()
        if self.engines is not None:
            self.engines.close()
        if self.grader is not None:
            self.grader.close()
        if self.judge is not None:
            self.judge.close()

    def state(self) -> dict:
        """What a checkpoint keeps beside weights and optimizer."""
        return {
            "step": self.step,
            "updates": self.updates,
            "critic_updates": self.critic_updates,
            "supervised_done": list(self.supervised_done),
            "acceptance": self.acceptance,
            "best": self.best,
            "entropy_coefficient": self.entropy_coefficient,
            "layout": self.ranks(),
            "groups": group_settings(self.recipe),
            "guards": {part: guard.state() for part, guard in self.guards.items()},
            "prompt_order": None if self.prompt_order is None else self.prompt_order.state(),
        }

    def ranks(self) -> dict:
        """How the ranks share the model, and a critic that they share otherwise: what states of each rank depend on."""
        shared = _shared(self.layout)
        if self.critic is None or self.critic.groups is self.learner.groups:
            return shared
        return shared | {CRITIC: _shared(self.critic.layout)}

    def learners(self) -> dict[str, Learner]:
        """By the name of its part in a checkpoint."""
        return {POLICY: self.learner} | ({} if self.critic is None else {CRITIC: self.critic})

    def load_state(self, state: dict) -> None:
        """Stand where `state` was taken."""
        self.step, self.updates = state["step"], state["updates"]
        self.critic_updates = state.get("critic_updates", 0)
        self.acceptance, self.best = state.get("acceptance", 1.0), state.get("best")
        self.entropy_coefficient = state.get("entropy_coefficient")
        for part, known in state.get("guards", {}).items():
            self.guards[part].load_state(known)
        done = state["supervised_done"]
        self.supervised_done = [*done, *[0] * (len(self.recipe.supervised.stages) - len(done))]
        if self.prompt_order is not None and state["prompt_order"] is not None:
            self.prompt_order.load_state(state["prompt_order"])


def _shared(layout: Layout) -> dict:
    return {"tensor": layout.tensor, "pipeline": layout.pipeline, "context": layout.context, "data": layout.data}


def group_settings(recipe: Recipe) -> dict:
    """What groups kept for the next step depend on: their size and shape, and what their old log-probs are of."""
    rollout = recipe.rollout
    settings = {
        "algorithm.overlong_filtering": recipe.algorithm.overlong_filtering,
        "rollout.samples_per_prompt": rollout.samples_per_prompt,
        "rollout.temperature": rollout.temperature,
    }
    if rollout.shape in SEGMENTED:
        settings |= {
            "rollout.shape": rollout.shape,
            "rollout.partition": rollout.partition.model_dump(),
            f"rollout.{rollout.shape}": getattr(rollout, rollout.shape).model_dump(),
        }
    return settings


def build_learner(
    recipe: Recipe,
    architecture: Architecture,
    layout: Layout,
    device: torch.device,
    weights: Path | None,
    *,
    resident_reference: bool = False,
) -> Learner:
    """The learner of a recipe on the groups in force; or the model that a resident reference lies in, bf16 and
    without an optimizer."""
    return Learner(
        architecture,
        layout,
        dtype=torch.bfloat16 if resident_reference else DTYPES[recipe.model.dtype],
        device=device,
        layer_spec=choose_layer_spec(recipe.model.layer_spec, device),
        tokens_per_micro_batch=recipe.learner.tokens_per_micro_batch,
        temperature=recipe.rollout.temperature,
        recompute=recipe.learner.recompute,
        weights=weights,
        optimizer=None if resident_reference else recipe.optimizer,
        loss_kernel=recipe.learner.loss_kernel,
        fused_linear_loss=recipe.learner.fused_linear_loss,
    )


def build_critic(recipe: Recipe, policy: Architecture, world: World, device: torch.device) -> Learner | None:
    """The critic of a recipe, None without one; on groups of its own where it is cut otherwise than the policy."""
    architecture, path = planned_critic(recipe, policy), recipe.critic.path
    if architecture is None:
        return None
    layout = derive_critic_layout(recipe, architecture, world.size)
    groups = form_groups_beside(layout, seed=recipe.run.seed, time_limit_s=recipe.learner.time_limit_s)
    with groups.in_force():
        return build_learner(recipe, architecture, layout, device, None if path is None else Path(path))


def assemble(recipe: Recipe, world: World, *, rollouts: bool = True) -> Run:
    """Build learner, engine, resharding plan and data of this rank; the default process group must exist.

    `rollouts`: false leaves out engines and the way to them, for runs that learn from files.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    torch.set_num_threads(recipe.learner.threads)
    load_extensions(recipe.algorithm.extensions)
    paths = run_paths(recipe)
    architecture = read_architecture(paths.model)
    layout = derive_layout(recipe, architecture, world.size)
    device = choose_device(recipe.learner.device, world.local_rank)
    form_groups(layout, seed=recipe.run.seed, time_limit_s=recipe.learner.time_limit_s)
    tokenizer = load_tokenizer(paths.model)
    # before learner and engines fill the device: vLLM measures what is free while it starts
    judge = start_judge(recipe, world, device, paths) if rollouts else None
    learner = build_learner(recipe, architecture, layout, device, paths.model)
    critic = build_critic(recipe, architecture, world, device)
    phases = Phases()
    profiler = Profiler(recipe.profile, phases, rank=world.rank, device=device, folder=paths.run / "profile")
    learner.phase = phases.own
    if critic is not None:
        critic.phase = phases.own
    resident = None
    if recipe.algorithm.needs_reference and recipe.algorithm.reference.placement == "resident":
        resident = build_learner(recipe, architecture, layout, device, None, resident_reference=True)
    stops = stop_tokens(architecture.eos_token_ids, tokenizer)
    learners = [learner] if critic is None else [learner, critic]
    optimizer_memory = OptimizerMemory(learners, offload=recipe.learner.offload_optimizer)
    engines = sync = dispatcher = None
    if rollouts:
        engines, sync, dispatcher = _rollout_side(recipe, world, learner, paths, stops, phases)
    grader = None
    if world.rank == 0 and rollouts:
        grader = Grader(recipe.reward, device, judge=None if judge is None else judge.judge)

    data_lines: list[str] = []

    def sampler(path: Path | None, side: Side) -> GroupSampler | None:
        if path is None:
            return None
        prompts, token_ids, lines = encode_prompts(tokenizer, recipe, path, side)
        data_lines.extend(lines)
        return GroupSampler(recipe, tokenizer, prompts, token_ids, dispatcher, grader)

    if recipe.rollout.shape == "preferences" and paths.train is not None:
        training = PreferencePairs(*encode_preferences(tokenizer, recipe, paths.train))
    else:
        training = sampler(paths.train, "train")
    return Run(
        recipe=recipe,
        paths=paths,
        architecture=architecture,
        layout=layout,
        world=world,
        device=device,
        tokenizer=tokenizer,
        learner=learner,
        engines=engines,
        sync=sync,
        grader=grader,
        training=training,
        validation=sampler(paths.validation, "validation"),
        prompt_order=None
        if training is None
        else PromptSampler(len(training.prompts), recipe.run.seed, recipe.data.shuffle),
        data_lines=data_lines,
        saver=CheckpointSaver(
            recipe.checkpoint,
            learner,
            paths.run,
            side_files=paths.model,
            critic=critic,
            critic_files=None if recipe.critic.path is None else Path(recipe.critic.path),
        ),
        optimizer_memory=optimizer_memory,
        phases=phases,
        stragglers=Stragglers(
            phases, every=recipe.run.stragglers_every, world=world.size, stage=learner.stage, device=device
        ),
        profiler=profiler,
        resident=resident,
        critic=critic,
        judge=judge,
        supervised_done=[0] * len(recipe.supervised.stages),
    )


def start_judge(recipe: Recipe, world: World, device: torch.device, paths: RunPaths) -> JudgeEngine | None:
    """Rank 0's judge, where the recipe gives it an engine of its own; collective.

    Raises:
        RunError: as `JudgeEngine`, on every rank.
    """
    if not judged_by_engine(recipe.reward):
        return None
    started: list[JudgeEngine] = []

    def start() -> None:
        settings, threads = recipe.reward.judge, recipe.learner.threads
        try:
            started.append(JudgeEngine(settings, device, threads=threads, logs=paths.run / "engines"))
        except RequestError as error:
            raise RunError(str(error)) from error

    done_on_rank_zero(start if world.rank == 0 else None, world.size)
    return started[0] if started else None


def _rollout_side(
    recipe: Recipe, world: World, learner: Learner, paths: RunPaths, stops: set[int], phases: Phases
) -> tuple[VLLMEngines | None, WeightSync | EngineSync, Dispatcher | ServerDispatcher]:
    """The engines (where they are servers), the way weights take to them, and the queue in front of them."""
    if recipe.rollout.engine == "vllm":
        return assemble_engines(recipe, world, learner, paths, stops)
    from dapo_megatron.rollout.hf_engine import HFEngine

    engine = HFEngine(
        paths.model,
        dtype=learner.dtype,
        device=learner.device,
        stop_tokens=stops,
        max_batch_sequences=recipe.rollout.max_batch_sequences,
    )
    limit = recipe.rollout.time_limit_s
    dispatcher = Dispatcher(engine, rank=world.rank, world=world.size, time_limit_s=limit, phase=phases.own)
    return None, WeightSync(recipe, learner, engine, world.rank), dispatcher


def append_samples(run: Run, groups: Sequence, when: str) -> None:
    """Keep the first completion of a few groups for the report (rank 0)."""
    if run.world.rank != 0:
        return
    with open(run.paths.run / "samples.jsonl", "a", encoding="utf-8") as file:
        for group in groups[: run.recipe.monitoring.samples]:
            sample = {
                "step": run.step,
                "when": when,
                "prompt": group.text,
                "response": group.responses[0],
                "answer": group.answer,
                "right": bool(group.accuracies[0]),
                "reward": float(group.rewards[0]),
            }
            file.write(json.dumps(sample) + "\n")
