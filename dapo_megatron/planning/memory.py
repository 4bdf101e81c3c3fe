"""Bytes of the fullest rank, by part and by phase, and whether they fit its card."""

from dataclasses import dataclass

from dapo_megatron.config import Architecture, Layout, Recipe, derive_critic_layout
from dapo_megatron.config.architecture import critic_of
from dapo_megatron.planning.activations import Attention, attention_of, spec_of
from dapo_megatron.planning.engine import BridgeBytes, EngineBytes, bridge_bytes, engine_bytes, longest_sequence
from dapo_megatron.planning.hardware import FIXED_BYTES, FRAGMENTED, Card, card_of, gigabytes
from dapo_megatron.planning.moments import ComputeBytes, compute_bytes
from dapo_megatron.planning.weights import StateBytes, state_bytes
from dapo_megatron.planning.workload import micro_batches

OF_LEARNING = (
    "parameters",
    "gradients",
    "optimizer",
    "critic",
    "activations",
    "logits",
    "contexts",
    "staging",
    "reserve",
)

FEW_HAVE = ("critic", "contexts", "staging")  # not told where there is none


@dataclass(frozen=True)
class StageMemory:
    """One pipeline stage's fullest rank (bytes). `learn`: at the fullest moment of an update, of policy or critic, to
    which activations, logits and update belong; `rollout`: while engines sample beside the learner's state."""

    state: StateBytes
    critic: int
    activations: int
    logits: int
    update: int
    reserve: int
    engine: EngineBytes
    bridge: BridgeBytes
    learn: int
    rollout: int

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part."""
        return {
            "parameters": self.state.parameters,
            "gradients": self.state.gradients,
            "optimizer": self.state.optimizer,
            "critic": self.critic,
            "activations": self.activations,
            "logits": self.logits,
            "update": self.update,
            "engine_weights": self.engine.weights,
            "kv_cache": max(0, self.engine.kv_cache),
            "contexts": self.bridge.contexts,
            "staging": self.bridge.staging,
            "reserve": self.reserve,
        }


@dataclass(frozen=True)
class Memory:
    """All stages, the number of the fullest, the card, and what does not fit, a line each."""

    stages: tuple[StageMemory, ...]
    fullest: int
    card: Card
    problems: tuple[str, ...]

    @property
    def parts(self) -> dict[str, int]:
        """Bytes of the fullest rank by part."""
        return self.stages[self.fullest].parts


def plan_memory(recipe: Recipe, a: Architecture, layout: Layout, *, attention: Attention | None = None) -> Memory:
    """Count every pipeline stage. `attention`: what computes it; None takes the recipe's.

        learn    = parameters + gradients + optimizer + critic + bridge + (activations + logits + update) + reserve
        rollout  = parameters + gradients + optimizer + critic + bridge + engine's share of the card + fixed reserve

    Engines that share the learner's cards give their memory back while it learns (vLLM's sleep); the learner keeps its
    state while they sample, with learner.offload_optimizer the parameters alone. Of a critic cut otherwise every rank
    is taken to hold the largest stage, and to compute as much as its fullest. The embedded engine keeps its weights
    throughout, as do the contexts and the bucket of the way there. A reference policy lies in host memory.
    """
    card = card_of(recipe)
    dtype, distributed = recipe.model.dtype, recipe.optimizer.distributed
    engine, bridge = engine_bytes(recipe, a, card), bridge_bytes(recipe, layout, card)
    per_update = layout.mini_batch_prompts * recipe.rollout.samples_per_prompt
    count = micro_batches(recipe, layout, per_update, float(longest_sequence(recipe))).count
    embedded = recipe.rollout.engine == "hf"
    attention = attention_of(recipe) if attention is None else attention
    critic, judging = None, ComputeBytes(0, 0)
    if recipe.algorithm.advantage == "gae":
        critic, judging = _critic_bytes(recipe, a, layout, per_update, attention)
    fixed = 0 if card.memory is None else FIXED_BYTES
    stages = []
    for pipeline in range(layout.pipeline):
        state, _ = state_bytes(a, layout, pipeline, dtype=dtype, distributed=distributed, spec=spec_of(attention))
        own = compute_bytes(recipe, a, layout, pipeline, count, attention=attention, state=state)
        compute = max(own, judging, key=lambda found: found.total)
        judged = 0 if critic is None else critic.total
        lost = 0 if card.memory is None else round(FRAGMENTED * compute.total)
        held = state.total + judged + bridge.contexts + bridge.staging + fixed + (engine.weights if embedded else 0)
        sampling = held + (max(0, engine.kv_cache) if embedded else 0)
        if recipe.learner.offload_optimizer:
            sampling -= sum(s.gradients + s.optimizer for s in (state, critic) if s is not None)
        if recipe.rollout.beside_learner:
            whole = engine.weights + max(0, engine.kv_cache)
            sampling += whole if card.memory is None else round(recipe.rollout.gpu_memory_share * card.memory)
        parts = (compute.activations, compute.logits, compute.update)
        learn = held + compute.total + lost
        stages.append(StageMemory(state, judged, *parts, fixed + lost, engine, bridge, learn, sampling))
    fullest = max(range(layout.pipeline), key=lambda i: stages[i].learn)  # sampling takes about the same everywhere
    problems = _problems(recipe, stages, engine, card) if card.memory is not None else []
    return Memory(tuple(stages), fullest, card, tuple(problems))


def _critic_bytes(
    recipe: Recipe, a: Architecture, layout: Layout, per_update: int, attention: Attention
) -> tuple[StateBytes, ComputeBytes]:
    """(the largest stage's state, the fullest's moment) of a critic as large as the policy: where its folder is not
    known here."""
    critic = critic_of(a)
    own = derive_critic_layout(recipe, critic, layout.world)
    count = micro_batches(recipe, own, per_update, float(longest_sequence(recipe))).count
    settings = {
        "dtype": recipe.model.dtype,
        "distributed": recipe.optimizer.distributed,
        "spec": spec_of(attention),
    }
    states, moments = [], []
    for pipeline in range(own.pipeline):
        states.append(state_bytes(critic, own, pipeline, **settings)[0])
        moments.append(compute_bytes(recipe, critic, own, pipeline, count, attention=attention, state=states[-1]))
    return max(states, key=lambda state: state.total), max(moments, key=lambda moment: moment.total)


def _problems(recipe: Recipe, stages: list[StageMemory], engine: EngineBytes, card: Card) -> list[str]:
    problems, rollout = [], recipe.rollout
    i = max(range(len(stages)), key=lambda i: stages[i].learn)
    if stages[i].learn > card.memory:
        stage = stages[i]
        parts = {name: count for name, count in stage.parts.items() if name in OF_LEARNING}
        told = ", ".join(f"{n} {gigabytes(count)} GB" for n, count in parts.items() if count or n not in FEW_HAVE)
        problems.append(
            f"learning needs {gigabytes(stage.learn)} GB on pipeline stage {i} and a {card.name} has "
            f"{gigabytes(card.memory)} GB: {told}"
        )
    i = max(range(len(stages)), key=lambda i: stages[i].rollout)
    if rollout.engine == "hf":
        if stages[i].rollout > card.memory:
            problems.append(
                f"rollout.engine=hf holds the whole model on every rank and needs {gigabytes(stages[i].rollout)} GB of "
                f"{gigabytes(card.memory)} GB; use rollout.engine=vllm"
            )
        return problems
    if engine.cached_tokens < longest_sequence(recipe):
        problems.append(
            f"rollout.gpu_memory_share={rollout.gpu_memory_share:g} of {gigabytes(card.memory)} GB leaves "
            f"{gigabytes(max(0, engine.kv_cache))} GB for the KV cache beside {gigabytes(engine.weights)} GB of "
            f"weights at rollout.tensor={rollout.tensor}; one sequence of {longest_sequence(recipe)} tokens needs "
            f"{gigabytes(longest_sequence(recipe) * engine.kv_token)} GB"
        )
    if stages[i].rollout > card.memory:
        share = largest_share(stages[i].rollout, rollout.gpu_memory_share, card)
        use = f"use {share:g} or less" if share > 0 else "that state leaves engines no room"
        problems.append(
            f"rollout.gpu_memory_share={rollout.gpu_memory_share:g} beside the learner's state needs "
            f"{gigabytes(stages[i].rollout)} GB and a {card.name} has {gigabytes(card.memory)} GB; {use}"
        )
    return problems


def largest_share(needed: int, share: float, card: Card) -> float:
    """The largest rollout.gpu_memory_share, in steps of 0.05, under which `needed` bytes at `share` would fit."""
    left = share + (card.memory - needed) / card.memory
    return max(0.0, int(left * 20 + 1e-9) / 20)
