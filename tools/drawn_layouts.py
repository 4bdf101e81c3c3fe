"""Layouts drawn from what recipes allow, small enough for ranks on a CPU: for `plan_against_measured.py`."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dapo_megatron.config import Architecture, Layout, Recipe, check_recipe, derive_layout
from dapo_megatron.config.architecture import architecture_from_dict
from dapo_megatron.config.derive import derive_critic_layout
from dapo_megatron.config.load import build_recipe
from dapo_megatron.data.packing import assign_micro_batches
from dapo_megatron.errors import RequestError
from dapo_megatron.planning.memory import plan_memory
from dapo_megatron.planning.weights import model_parameters
from dapo_megatron.resharding.megatron_layout import position_of

RANKS = 4  # at most
SMALLEST, LARGEST = 200e6, 350e6  # planned bytes of the fullest rank
LONGEST_S = 6.0  # of an update, estimated
ESTIMATED_RATE = {"fp32": 40e9, "bf16": 3e9}  # products and sums a second of two cores, for the draw alone
PROMPT_SHARE = 8  # of a sequence's tokens, one in so many is its prompt's


@dataclass(frozen=True)
class Case:
    """One layout: the settings of its recipe, config.json of its model, (prompt, response) tokens of each sequence."""

    settings: dict[str, Any]
    model: dict[str, Any]
    lengths: list[tuple[int, int]]

    @property
    def recipe(self) -> Recipe:
        return build_recipe(self.settings)

    @property
    def architecture(self) -> Architecture:
        return architecture_from_dict(self.model, "the drawn model")

    @property
    def layout(self) -> Layout:
        return derive_layout(self.recipe, self.architecture)


def drawn_cases(seed: int) -> Iterator[Case]:
    """Layouts without end, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        case = _allowed(_drawn(rng), rng)
        if case is not None:
            yield case


def _drawn(rng: random.Random) -> Case:
    """A model and a recipe, allowed or not."""
    family = rng.choice(["qwen2", "qwen3", "llama"])
    head_dim = rng.choice([32, 64, 128])
    heads = rng.choice([2, 4, 6, 8, 12])
    dtype = rng.choice(["fp32", "fp32", "bf16"])
    hidden = heads * head_dim if family != "qwen3" else rng.choice([256, 384, 512, 768])
    model = {
        "model_type": family, "hidden_size": hidden, "num_hidden_layers": rng.choice([1, 2, 4, 6, 8]),
        "num_attention_heads": heads, "num_key_value_heads": rng.choice([n for n in (1, 2, 4, 8) if heads % n == 0]),
        "head_dim": head_dim, "intermediate_size": rng.choice([2, 3, 4, 5]) * 4 * (hidden // 4),
        "vocab_size": rng.choice([1000, 4096, 10000, 16384, 32000]), "max_position_embeddings": 1 << 16,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": rng.random() < 0.4,
    }  # fmt: skip
    tensor, pipeline, context, data = rng.choice(
        [sizes for sizes in _sizes(RANKS) if sizes != (1, 1, 1, 1)] + [(1, 1, 1, 1)]
    )
    budget = rng.choice([512, 768, 1000, 1536, 2048, 3072, 4096])
    longest = budget
    if context > 1:  # lengths that need no padding to be cut, as many as fill a pack
        longest = budget // rng.choice([1, 2, 3, 4]) // (2 * context) * 2 * context
    critic = rng.random() < 0.25
    prompts = rng.choice([2, 3, 4])
    settings = {
        "run": {"directory": "runs/measured", "seed": rng.randrange(1 << 16)},
        "model": {"path": "drawn", "dtype": dtype},
        "parallel": {
            "tensor": tensor, "pipeline": pipeline, "virtual_pipeline": rng.choice([1, 2]) if pipeline > 1 else 1,
            "context": context, "sequence": tensor > 1 and rng.random() < 0.5,
            "world": tensor * pipeline * context * data,
        },
        "data": {"train": "unread.jsonl", "max_prompt_length": longest // PROMPT_SHARE},
        "rollout": {
            "samples_per_prompt": 1, "prompts_per_step": 1,
            "max_response_length": longest - longest // PROMPT_SHARE, "engine": "hf",
        },
        "algorithm": {
            "mini_batch_prompts": 1, "advantage": "gae" if critic else "group",
            "dynamic_sampling": {"enabled": False},
        },
        "optimizer": {"distributed": rng.random() < 0.75},
        "learner": {
            "device": "cpu", "tokens_per_micro_batch": budget,
            "recompute": rng.choice(["none", "none", "selective", "full"]),
            "fused_linear_loss": rng.random() < 0.4, "offload_optimizer": rng.random() < 0.25,
        },
    }  # fmt: skip
    if critic and rng.random() < 0.5 and tensor > 1:
        settings["critic"] = {"parallel": {"tensor": 1}}
    packs = prompts * (pipeline if settings["parallel"]["virtual_pipeline"] > 1 else 1)
    lengths = _lengths(rng, packs * data, data, budget)
    if context > 1:  # masks grow with the square of a length, and plans are for the greatest
        lengths = [_parts(longest)] * (packs * data * (budget // longest))
    settings["rollout"]["prompts_per_step"] = settings["algorithm"]["mini_batch_prompts"] = len(lengths)
    return Case(settings, model, lengths)


def _sizes(ranks: int) -> list[tuple[int, int, int, int]]:
    sizes = range(1, ranks + 1)
    return [(t, p, c, d) for t in sizes for p in sizes for c in sizes for d in sizes if t * p * c * d <= ranks]


def _lengths(rng: random.Random, packs: int, data: int, budget: int) -> list[tuple[int, int]]:
    """Sequences of an eighth to two thirds of the budget that fill so many packs of it, all but a few hundredths."""
    shares = []
    while sum(shares) < packs:
        shares.append(rng.uniform(1 / 8, 2 / 3))
    for filled in (0.99, 0.97, 0.95, 0.92, 0.88, 0.8):
        scale = filled * packs / sum(shares)
        lengths = [min(budget, max(16, int(share * scale * budget))) for share in shares]
        assigned = assign_micro_batches(lengths, token_budget=budget, data_parallel=data)
        if len(assigned[0]) * data <= packs:
            break
    return [_parts(length) for length in lengths]


def _parts(length: int) -> tuple[int, int]:
    """(prompt, response) of a sequence."""
    prompt = max(1, length // PROMPT_SHARE)
    return prompt, length - prompt


def _allowed(case: Case, rng: random.Random) -> Case | None:
    """The case, if a recipe may be so and it is neither too small nor too large for this machine."""
    try:
        recipe, a = case.recipe, case.architecture
        layout = derive_layout(recipe, a)
        check_recipe(recipe, a)
        if recipe.algorithm.advantage == "gae":
            derive_critic_layout(recipe, a, layout.world)
    except RequestError:
        return None
    planned = max(planned_bytes(recipe, a, layout, rank) for rank in range(layout.world))
    tokens = sum(prompt + response for prompt, response in case.lengths)
    models = 2 if recipe.algorithm.advantage == "gae" else 1
    seconds = 8 * model_parameters(a) * tokens * models / ESTIMATED_RATE[recipe.model.dtype]
    return case if SMALLEST <= planned <= LARGEST and seconds <= LONGEST_S else None


def planned_bytes(recipe: Recipe, a: Architecture, layout: Layout, rank: int) -> int:
    """Planned peak of a rank's learner; the embedded engine, which the tool does not start, left out."""
    stage = plan_memory(recipe, a, layout).stages[position_of(rank, layout).pipeline]
    return stage.learn - stage.engine.weights
