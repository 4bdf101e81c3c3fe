"""What a recipe needs of a machine, and how much of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dapo_megatron.config import Architecture, Layout, Recipe
from dapo_megatron.resharding.hf_layout import canonical_tensors

CHECKPOINT_BYTES = {"bf16": 14, "fp32": 16}  # a parameter: weights, fp32 main weights, two fp32 moments
KEPT_BESIDE = 2  # the best checkpoint, and the one under way


@dataclass(frozen=True)
class Needs:
    """packages: name as in `facts.PACKAGES` → the setting that wants it. world: learner ranks, None without a recipe;
    node_ranks: of them on one machine.

    cuda: the setting that wants a GPU, None where a CPU will do. engine_ranks: workers of the largest engine here.
    disk: bytes of checkpoints.
    """

    packages: Mapping[str, str] = field(default_factory=dict)
    cuda: str | None = None
    world: int | None = None
    node_ranks: int | None = None
    threads: int = 1
    engine_ranks: int = 0
    disk: int | None = None
    directory: str = "."


def needs_of(recipe: Recipe, architecture: Architecture, layout: Layout) -> Needs:
    """The needs of a recipe. What it leaves to the machine (auto) is no need."""
    packages = {}
    if recipe.model.layer_spec == "transformer_engine":
        packages["TransformerEngine"] = "model.layer_spec=transformer_engine"
    if recipe.learner.loss_kernel == "triton":
        packages["triton"] = "learner.loss_kernel=triton"
    own_engines = recipe.rollout.engine == "vllm" and not recipe.rollout.servers
    if own_engines:
        packages["vLLM"] = "rollout.engine=vllm"
    return Needs(
        packages=packages,
        cuda=_first(
            ("learner.device=cuda", recipe.learner.device == "cuda"),
            ("model.layer_spec=transformer_engine", recipe.model.layer_spec == "transformer_engine"),
        ),
        world=layout.world,
        node_ranks=min(layout.world, recipe.hardware.gpus_per_node) if recipe.learner.device != "cpu" else layout.world,
        threads=recipe.learner.threads,
        engine_ranks=recipe.rollout.tensor if own_engines else 0,
        disk=checkpoint_bytes(architecture, recipe.model.dtype) * (recipe.checkpoint.keep + KEPT_BESIDE),
        directory=recipe.run.directory,
    )


def checkpoint_bytes(architecture: Architecture, dtype: str) -> int:
    """Bytes of one checkpoint: weights and AdamW state of every parameter."""
    parameters = 0
    for shape in canonical_tensors(architecture).values():
        size = 1
        for length in shape:
            size *= length
        parameters += size
    return parameters * CHECKPOINT_BYTES[dtype]


def _first(*choices: Sequence) -> str | None:
    return next((setting for setting, wanted in choices if wanted), None)
