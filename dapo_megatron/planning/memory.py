"""Bytes of the fullest rank, by part and by phase, and whether they fit its card."""

from dataclasses import dataclass

from dapo_megatron.config import Architecture, Layout, Recipe, derive_critic_layout
from dapo_megatron.config.architecture import critic_of
from dapo_megatron.planning.activations import compute_bytes, layer_spec_of
from dapo_megatron.planning.engine import EngineBytes, engine_bytes, longest_sequence
from dapo_megatron.planning.hardware import FIXED_BYTES, FRAGMENTED, Card, card_of
from dapo_megatron.planning.weights import StateBytes, state_bytes
from dapo_megatron.planning.workload import micro_batches


@dataclass(frozen=True)
class StageMemory:
    """One pipeline stage's fullest rank (bytes). `learn`: while a mini-batch is computed; `rollout`: while engines
    sample beside the learner's state."""

    state: StateBytes
    critic: int
    activations: int
    logits: int
    reserve: int
    engine: EngineBytes
    learn: int
    rollout: int


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
        stage = self.stages[self.fullest]
        return {
            "parameters": stage.state.parameters,
            "gradients": stage.state.gradients,
            "optimizer": stage.state.optimizer,
            "critic": stage.critic,
            "activations": stage.activations,
            "logits": stage.logits,
            "engine_weights": stage.engine.weights,
            "kv_cache": max(0, stage.engine.kv_cache),
            "reserve": stage.reserve,
        }


def plan_memory(recipe: Recipe, a: Architecture, layout: Layout) -> Memory:
    """Count every pipeline stage.

        learn    = parameters + gradients + optimizer + critic + activations + logits + reserve
        rollout  = parameters + gradients + optimizer + critic + engine's share of the card + fixed reserve

    Engines that share the learner's cards give their memory back while it learns (vLLM's sleep); the learner keeps its
    state while they sample, with learner.offload_optimizer the parameters alone. Of a critic cut otherwise every rank
    is taken to hold the largest stage. The embedded engine keeps its weights throughout. A reference policy lies in
    host memory.
    """
    card = card_of(recipe)
    dtype, distributed = recipe.model.dtype, recipe.optimizer.distributed
    engine = engine_bytes(recipe, a, card)
    per_update = layout.mini_batch_prompts * recipe.rollout.samples_per_prompt
    count = micro_batches(recipe, layout, per_update, float(longest_sequence(recipe))).count
    embedded, beside = recipe.rollout.engine == "hf", recipe.rollout.placement == "colocated"
    critic = _critic_state(recipe, a, layout) if recipe.algorithm.advantage == "gae" else None
    fixed = 0 if card.memory is None else FIXED_BYTES
    stages = []
    for pipeline in range(layout.pipeline):
        state, _ = state_bytes(a, layout, pipeline, dtype=dtype, distributed=distributed, spec=layer_spec_of(recipe))
        compute = compute_bytes(recipe, a, layout, pipeline, count)
        judged = 0 if critic is None else critic.total
        lost = 0 if card.memory is None else round(FRAGMENTED * (compute.activations + compute.logits))
        held = state.total + judged + fixed + (engine.weights if embedded else 0)
        sampling = held + (max(0, engine.kv_cache) if embedded else 0)
        if recipe.learner.offload_optimizer:
            sampling -= sum(s.gradients + s.optimizer for s in (state, critic) if s is not None)
        if beside and not embedded:
            whole = engine.weights + max(0, engine.kv_cache)
            sampling += whole if card.memory is None else round(recipe.rollout.gpu_memory_share * card.memory)
        learn = held + compute.activations + compute.logits + lost
        stages.append(
            StageMemory(state, judged, compute.activations, compute.logits, fixed + lost, engine, learn, sampling)
        )
    fullest = max(range(layout.pipeline), key=lambda i: stages[i].learn)  # sampling takes about the same everywhere
    problems = _problems(recipe, stages, engine, card) if card.memory is not None else []
    return Memory(tuple(stages), fullest, card, tuple(problems))


def _critic_state(recipe: Recipe, a: Architecture, layout: Layout) -> StateBytes:
    """The largest stage of the critic, as large as the policy where its folder is not known here."""
    critic = critic_of(a)
    own = derive_critic_layout(recipe, critic, layout.world)
    settings = {
        "dtype": recipe.model.dtype,
        "distributed": recipe.optimizer.distributed,
        "spec": layer_spec_of(recipe),
    }
    stages = (state_bytes(critic, own, pipeline, **settings)[0] for pipeline in range(own.pipeline))
    return max(stages, key=lambda state: state.total)


def _problems(recipe: Recipe, stages: list[StageMemory], engine: EngineBytes, card: Card) -> list[str]:
    problems, rollout = [], recipe.rollout
    i = max(range(len(stages)), key=lambda i: stages[i].learn)
    if stages[i].learn > card.memory:
        stage = stages[i]
        problems.append(
            f"learning needs {_gb(stage.learn)} on pipeline stage {i} and a {card.name} has {_gb(card.memory)}: "
            f"parameters {_gb(stage.state.parameters)}, gradients {_gb(stage.state.gradients)}, optimizer "
            f"{_gb(stage.state.optimizer)}, {f'critic {_gb(stage.critic)}, ' if stage.critic else ''}activations "
            f"{_gb(stage.activations)}, logits {_gb(stage.logits)}, reserve {_gb(stage.reserve)}"
        )
    i = max(range(len(stages)), key=lambda i: stages[i].rollout)
    if rollout.engine == "hf":
        if stages[i].rollout > card.memory:
            problems.append(
                f"rollout.engine=hf holds the whole model on every rank and needs {_gb(stages[i].rollout)} of "
                f"{_gb(card.memory)}; use rollout.engine=vllm"
            )
        return problems
    if engine.cached_tokens < longest_sequence(recipe):
        problems.append(
            f"rollout.gpu_memory_share={rollout.gpu_memory_share:g} of {_gb(card.memory)} leaves "
            f"{_gb(max(0, engine.kv_cache))} for the KV cache beside {_gb(engine.weights)} of weights at "
            f"rollout.tensor={rollout.tensor}; one sequence of {longest_sequence(recipe)} tokens needs "
            f"{_gb(longest_sequence(recipe) * engine.kv_token)}"
        )
    if stages[i].rollout > card.memory:
        share = largest_share(stages[i].rollout, rollout.gpu_memory_share, card)
        use = f"use {share:g} or less" if share > 0 else "that state leaves engines no room"
        problems.append(
            f"rollout.gpu_memory_share={rollout.gpu_memory_share:g} beside the learner's state needs "
            f"{_gb(stages[i].rollout)} and a {card.name} has {_gb(card.memory)}; {use}"
        )
    return problems


def largest_share(needed: int, share: float, card: Card) -> float:
    """The largest rollout.gpu_memory_share, in steps of 0.05, under which `needed` bytes at `share` would fit."""
    left = share + (card.memory - needed) / card.memory
    return max(0.0, int(left * 20 + 1e-9) / 20)


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f} GB"
