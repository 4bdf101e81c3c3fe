"""How long the phases of a rollout step take, from counts of work and the rates of hardware.py."""

from dataclasses import dataclass, field

from dapo_megatron.config import Architecture, Layout, Recipe, derive_critic_layout
from dapo_megatron.config.architecture import critic_of
from dapo_megatron.planning.activations import attention_of, spec_of
from dapo_megatron.planning.engine import engine_bytes
from dapo_megatron.planning.hardware import (
    ALL_REDUCE_S,
    ATTENTION,
    DECODE_S,
    LINKS,
    MEMORY,
    PRODUCTS,
    Card,
    card_of,
)
from dapo_megatron.planning.weights import FP32, ITEMSIZE, model_parameters, state_bytes
from dapo_megatron.planning.workload import MicroBatches, Workload, micro_batches


@dataclass(frozen=True)
class Phase:
    """Seconds of a phase, and what they consist of, by words that a reader can act on."""

    parts: dict[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class StepTime:
    """Phases in the order in which a step runs them. `bubble`: share of the update's passes in which a stage waits."""

    phases: dict[str, Phase]
    bubble: float
    engines: int
    concurrency: float = field(default=0.0)  # sequences that an engine decodes at once

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases.values())

    @property
    def bottleneck(self) -> str:
        """The longest phase and the largest part of it, in words."""
        name = max(self.phases, key=lambda key: self.phases[key].seconds)
        phase = self.phases[name]
        part = max(phase.parts, key=phase.parts.__getitem__)
        of_phase = phase.parts[part] / phase.seconds if phase.seconds else 0.0
        return f"{name}, {phase.seconds / self.seconds:.0%} of the step; {of_phase:.0%} of it is {part}"


def step_time(
    recipe: Recipe,
    a: Architecture,
    layout: Layout,
    work: Workload,
    *,
    engines: int,
    busiest_link_bytes: float | None,
    crossing_bytes: float | None = None,
    card: Card | None = None,
) -> StepTime:
    """Seconds of a step by phase: rollout, score, (reference, critic,) update, reshard.

    `busiest_link_bytes`: the most that one rank sends or receives in a weight transfer (resharding/summary.py); None
    leaves that phase out. `crossing_bytes`: the most that one rank sends or receives between machines, where engines
    stand beside the learner on several: the other bytes then stay inside machines, and both go on at once. `card`: what
    the ranks run on; None takes the recipe's.
    """
    card = card_of(recipe) if card is None else card
    phases: dict[str, Phase] = {}
    concurrency = 0.0
    if work.drawn:
        phases["rollout"], concurrency = _rollout(recipe, a, card, work, engines)
    score = micro_batches(recipe, layout, work.trained, work.sequence)
    phases["score"] = _passes(recipe, a, layout, card, work, score, updates=1, backward=False)
    if recipe.algorithm.needs_reference:
        phases["reference"] = phases["score"]
    mini = micro_batches(recipe, layout, work.trained // work.updates, work.sequence)
    phases["update"] = _passes(recipe, a, layout, card, work, mini, updates=work.updates, backward=True)
    if recipe.algorithm.advantage == "gae":
        critic, epochs = critic_of(a), recipe.critic.epochs
        own = derive_critic_layout(recipe, critic, layout.world)
        score = micro_batches(recipe, own, work.trained, work.sequence)
        mini_critic = micro_batches(recipe, own, work.trained // work.updates, work.sequence)
        values = _passes(recipe, critic, own, card, work, score, updates=1, backward=False)
        learnt = _passes(recipe, critic, own, card, work, mini_critic, updates=work.updates * epochs, backward=True)
        names = (*learnt.parts, *values.parts)
        phases["critic"] = Phase({n: learnt.parts.get(n, 0.0) + values.parts.get(n, 0.0) for n in names})
    if busiest_link_bytes is not None:
        one_node = layout.world <= recipe.hardware.gpus_per_node or crossing_bytes is not None
        link = (card.inside if one_node else card.outside) * LINKS
        parts = {"moving weights over the busiest link": busiest_link_bytes / link}
        if crossing_bytes is not None:
            parts["moving weights between machines"] = crossing_bytes / (card.outside * LINKS)
        longest = max(parts, key=parts.__getitem__)
        phases["reshard"] = Phase({longest: parts[longest]})
    fill = (layout.pipeline - 1) / layout.virtual_pipeline
    return StepTime(phases, fill / (mini.count + fill), engines, concurrency)


def _rollout(recipe: Recipe, a: Architecture, card: Card, work: Workload, engines: int) -> tuple[Phase, float]:
    """Decoding is bound by reading weights and cache, or by products where many sequences share a reading:

    iteration(c) = max((weights + c context kv_token) / memory rate, 2 N c / (tensor rate)) + fixed
    seconds      = iteration(c) responses mean / (engines c) + waves (longest - mean) iteration(1) + prefill
    """
    rollout = recipe.rollout
    tensor = rollout.tensor if rollout.engine == "vllm" else 1
    held = engine_bytes(recipe, a, card)
    context = work.prompt + work.response / 2
    each = work.drawn / engines
    fit = held.cached_tokens / max(1.0, context)
    c = max(1.0, min(rollout.max_batch_sequences, fit, each / work.waves))
    products = 2 * model_parameters(a)
    rate, reading = tensor * card.flops * PRODUCTS, card.memory_rate * MEMORY
    fixed = DECODE_S + (2 * a.layers * ALL_REDUCE_S if tensor > 1 else 0.0)

    def iteration(count: float) -> dict[str, float]:
        cache = count * context * held.kv_token / reading
        weights = held.weights / reading
        compute = count * products / rate
        if compute > weights + cache:
            return {"products of decoding": compute, "launches and small all-reduces of decoding": fixed}
        return {
            "reading the KV cache": cache,
            "reading weights while decoding": weights,
            "launches and small all-reduces of decoding": fixed,
        }

    times = each * work.response / c
    parts = {name: times * seconds for name, seconds in iteration(c).items()}
    alone = work.waves * max(0.0, work.longest - work.response)
    parts["waiting for the longest responses"] = alone * sum(iteration(1.0).values())
    prompts = work.drawn / rollout.samples_per_prompt * work.prompt
    parts["reading prompts"] = prompts * products / (engines * rate)
    return Phase(parts), c


def _passes(
    recipe: Recipe,
    a: Architecture,
    layout: Layout,
    card: Card,
    work: Workload,
    packs: MicroBatches,
    *,
    updates: int,
    backward: bool,
) -> Phase:
    """`updates` mini-batches through the pipeline; a stage takes for each micro-batch of T rows

    products     2 T (layers of a stage x weights + output layer) / t / rate     once forward, twice backward,
    attention    2 T length q layers / t / rate                                  once more with recomputation
    tensor       4 T h b (t - 1) / t / link a layer                              forward; 1.5 times backward
    context      2 T k b (c - 1) / t / link a layer                              forward; twice backward
    bubble       ((p - 1) / v) / count of all that
    gradients    (4 + b) x elements (d c - 1) / (d c) / link an update, and the optimizer's reading and writing
    """
    b, t, p, c = ITEMSIZE[recipe.model.dtype], layout.tensor, layout.pipeline, layout.context
    d = layout.data * c  # ranks that share the gradients
    layers = a.layers / p
    rows = packs.rows / c
    head = (a.hidden if a.value_head else a.vocab * a.hidden) / t
    weights = layers * (model_parameters(a) - head * t) / a.layers / t + head
    again = recipe.learner.recompute == "full" and backward
    times = (3.0 if backward else 1.0) + (1.0 if again else 0.0)
    queries = a.heads * a.head_dim
    inside = card.inside if t <= recipe.hardware.gpus_per_node else card.outside
    steps = updates * packs.count
    products = steps * times * 2 * rows * weights / (card.flops * PRODUCTS)
    attention = steps * times * 2 * rows * work.sequence * queries * layers / t / (card.flops * ATTENTION)
    exchanges = (2.5 if backward else 1.0) + (1.0 if again else 0.0)
    tensor = steps * exchanges * layers * 4 * rows * a.hidden * b * (t - 1) / t / (inside * LINKS)
    keys = a.kv_heads * a.head_dim / t
    near = card.inside if t * c <= recipe.hardware.gpus_per_node else card.outside
    context = steps * times * layers * 2 * rows * keys * b * (c - 1) / (near * LINKS)
    bubble = (p - 1) / layout.virtual_pipeline / packs.count * (products + attention + tensor + context)
    parts = {"matrix products": products, "attention": attention}
    if t > 1:
        parts["exchanges between tensor-parallel ranks"] = tensor
    if c > 1:
        parts["keys and values between context-parallel ranks"] = context
    if p > 1:
        parts["pipeline bubble"] = bubble
    if backward:
        options = {"distributed": recipe.optimizer.distributed, "spec": spec_of(attention_of(recipe))}
        state, _ = state_bytes(a, layout, 0, dtype=recipe.model.dtype, **options)
        one_node = t * d <= recipe.hardware.gpus_per_node
        link = (card.inside if one_node else card.outside) * LINKS
        gradients = state.gradients / FP32
        sent = (FP32 + b if recipe.optimizer.distributed else 2 * FP32) * gradients * (d - 1) / d
        if d > 1:
            parts["gradients and parameters between data-parallel ranks"] = updates * sent / link
        touched = 2 * state.optimizer + state.gradients
        parts["optimizer"] = updates * touched / (card.memory_rate * MEMORY)
    return Phase(parts)
