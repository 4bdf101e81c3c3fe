"""What follows from a recipe and a model: computed once, here; planning and training read only the Layout."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from dapo_megatron.config.architecture import Architecture
from dapo_megatron.config.parallel import Parallel
from dapo_megatron.config.problems import join_or
from dapo_megatron.config.recipe import Recipe
from dapo_megatron.errors import RequestError


@dataclass(frozen=True)
class Layout:
    """Sizes of the learner's parallel groups and of a rollout step."""

    world: int  # ranks = tensor x pipeline x context x data
    tensor: int
    pipeline: int
    virtual_pipeline: int  # model chunks a pipeline rank; 1 = not interleaved
    context: int
    data: int
    sequence_parallel: bool
    layers_per_chunk: int
    mini_batch_prompts: int
    updates_per_step: int  # gradient updates a rollout step
    responses_per_step: int
    padded_vocab: int  # smallest multiple of lcm(tensor, 64) that holds the vocabulary (rows)


def derive_layout(recipe: Recipe, architecture: Architecture, world: int | None = None) -> Layout:
    """The layout of `recipe` on `architecture` with `world` ranks.

        data = world / (tensor x pipeline x context)
        layers_per_chunk = layers / (pipeline x virtual_pipeline)
        updates_per_step = prompts_per_step / mini_batch_prompts
        responses_per_step = prompts_per_step x samples_per_prompt

    `world` is the one that exists (torchrun, srun); None takes parallel.world, and without that the product
    tensor x pipeline x context.

    Raises RequestError with every size that does not divide, one a line.
    """
    parallel, algorithm, rollout = recipe.parallel, recipe.algorithm, recipe.rollout
    size = _world_size(recipe, world)
    problems = [
        *_model_problems(parallel, architecture, "parallel"),
        *_world_problems(parallel, size, "world" if world is not None else "parallel.world"),
        *(vllm_tensor_problems(rollout.tensor, architecture) if rollout.engine == "vllm" else ()),
    ]
    if rollout.prompts_per_step % algorithm.mini_batch_prompts:
        works = _nearest_divisors(rollout.prompts_per_step, algorithm.mini_batch_prompts)
        problems.append(
            f"algorithm.mini_batch_prompts={algorithm.mini_batch_prompts} does not divide "
            f"rollout.prompts_per_step={rollout.prompts_per_step}; use {join_or([str(n) for n in works])}"
        )
    if problems:
        raise RequestError("\n".join(problems))
    return _layout(recipe, parallel, architecture, size)


def derive_critic_layout(recipe: Recipe, critic: Architecture, world: int | None = None) -> Layout:
    """The layout of a recipe's critic, on the ranks of `derive_layout`.

    Raises RequestError with every size of critic.parallel that does not divide, one a line.
    """
    parallel, size = critic_parallel(recipe), _world_size(recipe, world)
    problems = _model_problems(parallel, critic, "critic.parallel")
    ranks = parallel.tensor * parallel.pipeline * parallel.context
    if size % ranks:
        works = [str(n) for n in _nearest_divisors(size // parallel.context, ranks // parallel.context)]
        policy = recipe.parallel
        larger = math.lcm(ranks, policy.tensor * policy.pipeline * policy.context)
        problems.append(
            f"critic.parallel.tensor={parallel.tensor} x critic.parallel.pipeline={parallel.pipeline} = "
            f"{parallel.tensor * parallel.pipeline} does not divide the world of {size} ranks; use a product of "
            f"{join_or(works)}{f', or parallel.world={larger}' if world is None else ''}"
        )
    if problems:
        raise RequestError("\n".join(problems))
    return _layout(recipe, parallel, critic, size)


def critic_parallel(recipe: Recipe) -> Parallel:
    """The sizes of the critic's groups: its own, else the policy's."""
    policy, own = recipe.parallel, recipe.critic.parallel
    tensor, pipeline = own.tensor or policy.tensor, own.pipeline or policy.pipeline
    virtual = policy.virtual_pipeline if pipeline == policy.pipeline else 1
    sequence = policy.sequence and tensor > 1
    return policy.model_copy(
        update={
            "tensor": tensor,
            "pipeline": pipeline,
            "virtual_pipeline": own.virtual_pipeline or virtual,
            "sequence": sequence if own.sequence is None else own.sequence,
        }
    )


def _world_size(recipe: Recipe, world: int | None) -> int:
    parallel = recipe.parallel
    model_ranks = parallel.tensor * parallel.pipeline * parallel.context
    return next(n for n in (world, parallel.world, model_ranks) if n is not None)


def _layout(recipe: Recipe, parallel: Parallel, architecture: Architecture, world: int) -> Layout:
    algorithm, rollout = recipe.algorithm, recipe.rollout
    return Layout(
        world=world,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual_pipeline=parallel.virtual_pipeline,
        context=parallel.context,
        data=world // (parallel.tensor * parallel.pipeline * parallel.context),
        sequence_parallel=parallel.sequence,
        layers_per_chunk=architecture.layers // (parallel.pipeline * parallel.virtual_pipeline),
        mini_batch_prompts=algorithm.mini_batch_prompts,
        updates_per_step=rollout.prompts_per_step // algorithm.mini_batch_prompts,
        responses_per_step=rollout.prompts_per_step * rollout.samples_per_prompt,
        padded_vocab=round_up(architecture.vocab, math.lcm(parallel.tensor, 64)),
    )


def derive_engines(recipe: Recipe, layout: Layout, *, cpu: bool) -> int:
    """Number of vllm engines: rollout.engines, or one for each of rollout.servers, or as many as the learner's devices
    hold, world // rollout.tensor; on a CPU one.

    Raises RequestError: they hold none.
    """
    rollout = recipe.rollout
    if rollout.engines is not None:
        return rollout.engines
    if rollout.servers:
        return len(rollout.servers)
    if cpu:
        return 1
    if rollout.tensor > layout.world:
        raise RequestError(
            f"rollout.tensor={rollout.tensor} exceeds the learner's {layout.world} ranks, whose devices hold no such "
            f"engine; use {layout.world} or less, or set rollout.engines"
        )
    return layout.world // rollout.tensor


def engine_owner(engine: int, *, engines: int, tensor: int, world: int) -> int:
    """The rank that starts engine `engine`: owners are spread over the world, engine 0 is rank 0's.

    Where the world has a device for each worker, engines begin at multiples of `tensor`, so that none leaves its
    node where `tensor` divides the node's devices.
    """
    rank = engine * world // engines
    return rank // tensor * tensor if engines * tensor <= world else rank


def engine_owners(engines: int, *, tensor: int, world: int) -> list[int]:
    """`engine_owner` of every engine."""
    return [engine_owner(engine, engines=engines, tensor=tensor, world=world) for engine in range(engines)]


def vllm_tensor_problems(tensor: int, architecture: Architecture) -> list[str]:
    """What keeps vLLM from building `architecture` with rollout.tensor = `tensor`, one problem a line; empty if none.

    It replicates key/value heads where there are fewer of them than workers, and pads the vocabulary to 64 rows.
    """
    rows = round_up(architecture.vocab, 64)
    rules: list[tuple[str, Callable[[int], bool]]] = [
        *_head_rules(architecture),
        (f"does not divide the {rows} rows of the padded vocabulary", lambda n: rows % n == 0),
    ]
    problems = _broken("rollout.tensor", tensor, rules, architecture.heads)
    own = architecture.hidden // architecture.heads
    if architecture.family == "qwen2" and architecture.head_dim != own:
        problems.append(
            f"rollout.engine=vllm builds qwen2 with head_dim={own} (hidden size / heads) and the model has "
            f"{architecture.head_dim}; use rollout.engine=hf"
        )
    return problems


def _model_problems(parallel: Parallel, architecture: Architecture, section: str) -> list[str]:
    """Sizes of `section` that do not divide the model."""
    problems = _tensor_problems(parallel, architecture, section) + _pipeline_problems(parallel, architecture, section)
    if parallel.sequence and parallel.tensor == 1:
        problems.append(f"{section}.sequence=true needs {section}.tensor > 1; use {section}.sequence=false")
    return problems


def _tensor_problems(parallel: Parallel, architecture: Architecture, section: str) -> list[str]:
    qkv_rows = (architecture.heads + 2 * architecture.kv_heads) * architecture.head_dim
    rules: list[tuple[str, Callable[[int], bool]]] = [
        *_head_rules(architecture),
        (f"does not divide {qkv_rows} query, key and value rows", lambda n: qkv_rows % n == 0),
    ]
    return _broken(f"{section}.tensor", parallel.tensor, rules, architecture.heads)


def _head_rules(architecture: Architecture) -> list[tuple[str, Callable[[int], bool]]]:
    return [
        (f"does not divide {architecture.heads} attention heads", lambda n: architecture.heads % n == 0),
        (
            f"neither divides {architecture.kv_heads} key/value heads nor is a multiple of them",
            lambda n: architecture.kv_heads % n == 0 or n % architecture.kv_heads == 0,
        ),
        (f"does not divide ffn size {architecture.ffn}", lambda n: architecture.ffn % n == 0),
    ]


def _broken(name: str, value: int, rules: list[tuple[str, Callable[[int], bool]]], most: int) -> list[str]:
    # the sizes proposed satisfy all rules, not only the one that is broken
    works = [n for n in range(1, most + 1) if all(holds(n) for _, holds in rules)]
    return [
        f"{name}={value} {what}; use {join_or([str(n) for n in works])}" for what, holds in rules if not holds(value)
    ]


def _pipeline_problems(parallel: Parallel, architecture: Architecture, section: str) -> list[str]:
    problems = []
    pipeline, virtual = parallel.pipeline, parallel.virtual_pipeline
    if virtual > 1 and pipeline == 1:
        problems.append(f"{section}.virtual_pipeline={virtual} needs {section}.pipeline > 1; use virtual_pipeline=1")
    if architecture.layers % (pipeline * virtual):
        works = join_or([str(n) for n in _nearest_divisors(architecture.layers, pipeline * virtual)])
        if virtual == 1:
            problems.append(f"{section}.pipeline={pipeline} does not divide {architecture.layers} layers; use {works}")
        else:
            problems.append(
                f"{section}.pipeline={pipeline} x {section}.virtual_pipeline={virtual} = {pipeline * virtual} "
                f"does not divide {architecture.layers} layers; use a product of {works}"
            )
    return problems


def _world_problems(parallel: Parallel, world: int, name: str) -> list[str]:
    factors = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context}
    product = math.prod(factors.values())
    if world >= 1 and world % product == 0:
        return []
    below = world // product * product
    works = [str(n) for n in (below, below + product) if n >= 1]
    told = " x ".join(f"parallel.{key} {value}" for key, value in factors.items())
    return [f"{name}={world} is not a multiple of {product} = {told}; use {join_or(works)}"]


def _nearest_divisors(number: int, wanted: int) -> list[int]:
    """The largest divisor of `number` below `wanted` and the smallest above it, where there is one."""
    divisors = [n for n in range(1, number + 1) if number % n == 0]
    below = [n for n in divisors if n < wanted]
    above = [n for n in divisors if n > wanted]
    return below[-1:] + above[:1]


def round_up(number: int, multiple: int) -> int:
    """The smallest multiple that is not below `number`."""
    return -(-number // multiple) * multiple
