"""Cards and links in numbers: the one table that plans count with.

Peaks are those of the makers' data sheets; memory is what torch reports as total, rounded down. The shares of a peak
that are reached in practice, and the fixed costs, are assumptions: no run on GPUs has measured them yet.
"""

from dataclasses import dataclass

from dapo_megatron.config import Recipe

GIB = 1 << 30


@dataclass(frozen=True)
class Card:
    """One device of a rank. Rates are peaks, a second; links in each direction, of one device."""

    name: str
    memory: int | None  # bytes; None: a CPU, whose memory is not checked
    flops: float  # dense bf16 products and sums
    memory_rate: float  # bytes
    inside: float  # bytes to devices of the same node: NVLink
    outside: float  # bytes to other nodes: InfiniBand


CARDS = {
    "h100": Card("H100 80 GB", 79 * GIB, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Card("H200 141 GB", 139 * GIB, 989e12, 4.8e12, 450e9, 50e9),
    "a100": Card("A100 80 GB", 79 * GIB, 312e12, 2.04e12, 300e9, 25e9),
    "cpu": Card("CPU", None, 50e9, 10e9, 2e9, 1e9),
}

PRODUCTS = 0.6  # of the peak, for products of large matrices
ATTENTION = 0.4  # of the peak, for causal attention
MEMORY = 0.7  # of the peak, for reading weights and KV cache
LINKS = 0.75  # of the peak, for large messages

FIXED_BYTES = 3 * GIB  # CUDA contexts of learner and engine, NCCL's buffers, workspaces of matrix products
# of a process on a card on which it only opens another's memory: what SGLang measured of a rank that did the same
# (github.com/sgl-project/sglang, pull request 22662); torch makes a whole context there
CONTEXT_BYTES = 500 << 20
FRAGMENTED = 0.05  # of activations and logits, lost between the allocator's blocks
ENGINE_BYTES = 3 * GIB  # inside vLLM's share: activations, CUDA graphs, its sampler's logits
DECODE_S = 1.5e-3  # of one decoding iteration on a GPU: scheduler, launches, sampling
ALL_REDUCE_S = 12e-6  # of one small all-reduce inside an engine


def card_of(recipe: Recipe) -> Card:
    """The card of the recipe's ranks."""
    return CARDS["cpu" if recipe.learner.device == "cpu" else recipe.hardware.gpu]


def gigabytes(count: float, *, digits: int = 1) -> str:
    """Bytes in units of 10^9, without the unit."""
    return f"{count / 1e9:.{digits}f}"
