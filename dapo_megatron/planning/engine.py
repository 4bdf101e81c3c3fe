"""What the rollout engines of a recipe hold on a device."""

import math
from dataclasses import dataclass

from dapo_megatron.config import Architecture, Layout, Recipe
from dapo_megatron.config.derive import derive_engines
from dapo_megatron.planning.hardware import CONTEXT_BYTES, ENGINE_BYTES, Card
from dapo_megatron.planning.weights import ITEMSIZE
from dapo_megatron.resharding.hf_layout import canonical_tensors
from dapo_megatron.resharding.vllm_layout import vllm_local_shapes


@dataclass(frozen=True)
class EngineBytes:
    """Bytes on one device. `kv_token`: of one token's keys and values; `kv_cache` < 0: weights alone fill the share."""

    weights: int
    kv_token: int
    kv_cache: int

    @property
    def cached_tokens(self) -> int:
        """Tokens that an engine's cache holds."""
        return max(0, self.kv_cache) // self.kv_token


def engine_bytes(recipe: Recipe, a: Architecture, card: Card) -> EngineBytes:
    """Weights and KV cache of an engine on each of its devices.

        kv_token = 2 layers max(1, kv heads / tensor) head size b
        kv_cache = gpu_memory_share x memory - weights - 3 GiB       of vllm; on a CPU rollout.cpu_kv_cache_gib

    The embedded engine holds the whole model, and keys and values of max_batch_sequences of the greatest length.
    """
    rollout, b = recipe.rollout, ITEMSIZE[recipe.model.dtype]
    vllm = rollout.engine == "vllm"
    shapes = vllm_local_shapes(a, rollout.tensor) if vllm else canonical_tensors(a)
    weights = b * sum(math.prod(shape) for shape in shapes.values())
    kv_heads = max(1, a.kv_heads // (rollout.tensor if vllm else 1))
    kv_token = 2 * a.layers * kv_heads * a.head_dim * b
    if not vllm:
        cache = rollout.max_batch_sequences * longest_sequence(recipe) * kv_token
    elif card.memory is None:
        cache = rollout.cpu_kv_cache_gib << 30
    else:
        cache = round(rollout.gpu_memory_share * card.memory) - weights - ENGINE_BYTES
    return EngineBytes(weights, kv_token, cache)


@dataclass(frozen=True)
class BridgeBytes:
    """What the way of weights into engines holds on a learner's card, from the first transfer on. contexts: CUDA
    contexts of workers that stand on other cards of the node; staging: the bucket."""

    contexts: int
    staging: int


def bridge_bytes(recipe: Recipe, layout: Layout, card: Card) -> BridgeBytes:
    """At most, on each card of the learner:

        contexts = 500 MiB x other cards' workers of the node     vllm engines beside the learner: each copies from all
        staging  = resharding.bucket_mib                          but on one node, where workers copy from weights alone

    Of a CPU nothing is counted, as its memory is not checked; an only rank has its weights copied.
    """
    rollout, world = recipe.rollout, layout.world
    if card.memory is None:
        return BridgeBytes(0, 0)
    cards, contexts = min(recipe.hardware.gpus_per_node, world), 0
    beside = rollout.beside_learner
    if beside:
        workers = derive_engines(recipe, layout, cpu=False) * rollout.tensor
        contexts = CONTEXT_BYTES * min(cards - 1, workers)
    through_bucket = cards < world if beside else world > 1 or rollout.engine == "vllm"
    return BridgeBytes(contexts, recipe.resharding.bucket_mib << 20 if through_bucket else 0)


def longest_sequence(recipe: Recipe) -> int:
    """Prompt and response (tokens)."""
    return recipe.data.max_prompt_length + recipe.rollout.max_response_length
