"""The layout nearest to a recipe's that works: few settings changed, each by little."""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

from dapo_megatron.config import Architecture, Recipe, derive_layout
from dapo_megatron.config.derive import derive_engines
from dapo_megatron.errors import RequestError
from dapo_megatron.planning.memory import largest_share, plan_memory

WORLDS = (1, 2, 4, 8)  # times the recipe's world
SHARE_COST = 5  # of a whole card


def nearest_fit(recipe: Recipe, a: Architecture) -> dict[str, Any] | None:
    """Settings (dotted names) that make the recipe fit, None if the search finds none.

    Looks at tensor and pipeline sizes and, where they alone do not help, larger worlds; recomputation; the fused output
    layer; the optimizer in host memory while engines sample on the same cards; the engines' tensor size and share of
    the cards. The cost of a candidate is the sum of |log2(new / old)| over sizes, worlds counted four times, plus 1 for
    each switch that is turned, plus 5 times what the engines' share loses; the cheapest that fits is taken, of equal
    ones that with fewer pipeline stages.
    """
    best: tuple[float, dict[str, Any]] | None = None
    for (cost, *_), settings in sorted(_candidates(recipe, a), key=lambda found: found[0]):
        if best is not None and cost >= best[0]:
            break
        found = _made_to_fit(with_settings(recipe, settings), a)
        if found is None:
            continue
        share = found.get("rollout.gpu_memory_share", recipe.rollout.gpu_memory_share)
        whole = cost + SHARE_COST * (recipe.rollout.gpu_memory_share - share)
        if best is None or whole < best[0]:
            best = whole, {**settings, **found}
    if best is None:
        return None
    return {name: value for name, value in best[1].items() if value != setting(recipe, name)}


def with_settings(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """The recipe with `section.key` → value changed."""
    sections: dict[str, dict[str, Any]] = {}
    for name, value in settings.items():
        section, key = name.split(".")
        sections.setdefault(section, {})[key] = value
    changed = {name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
    return recipe.model_copy(update=changed)


def setting(recipe: Recipe, name: str) -> Any:
    """The value of `section.key`."""
    section, key = name.split(".")
    return getattr(getattr(recipe, section), key)


def _candidates(recipe: Recipe, a: Architecture) -> Iterator[tuple[tuple[float, int, int, int], dict[str, Any]]]:
    parallel, learner, rollout = recipe.parallel, recipe.learner, recipe.rollout
    node = recipe.hardware.gpus_per_node
    tensors = [n for n in range(1, min(a.heads, node) + 1)]
    pipelines = [n for n in range(1, a.layers + 1) if a.layers % n == 0]
    recomputes = list(dict.fromkeys([learner.recompute, "full"]))
    fusions = list(dict.fromkeys([learner.fused_linear_loss, True]))
    beside = rollout.beside_learner
    offloads = list(dict.fromkeys([learner.offload_optimizer, learner.offload_optimizer or beside]))
    engines = [rollout.tensor]
    if rollout.engine == "vllm":
        engines = sorted({rollout.tensor, *(n for n in range(1, node + 1) if node % n == 0)})
    sizes = (WORLDS, tensors, pipelines, recomputes, fusions, offloads, engines)
    for times, t, p, recompute, fused, offload, e in product(*sizes):
        model_ranks = t * p * parallel.context
        world = times * (parallel.world or model_ranks)
        if world % model_ranks:
            continue
        settings: dict[str, Any] = {
            "parallel.tensor": t,
            "parallel.pipeline": p,
            "parallel.sequence": t > 1 and (parallel.sequence or parallel.tensor == 1),
            "learner.recompute": recompute,
            "learner.fused_linear_loss": fused,
            "learner.offload_optimizer": offload,
            "rollout.tensor": e,
        }
        if times > 1 or parallel.world is not None:
            settings["parallel.world"] = world
        cost = 4 * math.log2(times) + abs(math.log2(t / parallel.tensor)) + abs(math.log2(p / parallel.pipeline))
        cost += abs(math.log2(e / rollout.tensor)) + (recompute != learner.recompute)
        cost += (fused != learner.fused_linear_loss) + (offload != learner.offload_optimizer)
        if a.layers % (p * parallel.virtual_pipeline) or (p == 1 and parallel.virtual_pipeline > 1):
            settings["parallel.virtual_pipeline"] = 1
            cost += 1
        yield (round(cost, 6), p, t, e), settings


def _made_to_fit(recipe: Recipe, a: Architecture) -> dict[str, Any] | None:
    """What else must change for the candidate to fit: nothing, or the engines' share; None if it does not."""
    try:
        layout = derive_layout(recipe, a)
        if recipe.rollout.engine == "vllm":
            derive_engines(recipe, layout, cpu=recipe.learner.device == "cpu")
    except RequestError:
        return None
    memory = plan_memory(recipe, a, layout)
    if not memory.problems:
        return {}
    if not recipe.rollout.beside_learner:
        return None
    most = max(stage.rollout for stage in memory.stages)
    share = largest_share(most, recipe.rollout.gpu_memory_share, memory.card)
    if not 0 < share < recipe.rollout.gpu_memory_share:
        return None
    changed = {"rollout.gpu_memory_share": share}
    return None if plan_memory(with_settings(recipe, changed), a, layout).problems else changed
