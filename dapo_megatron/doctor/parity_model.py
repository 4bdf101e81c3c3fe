"""The tiny model on which `doctor --parity` runs: the recipe's family, dtype and temperature, random weights."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dapo_megatron.config import Architecture, Recipe
from dapo_megatron.config.architecture import architecture_from_dict
from dapo_megatron.config.model import Scratch
from dapo_megatron.data.records import SequenceBatch, sequence_batch
from dapo_megatron.prepare import planned_architecture
from dapo_megatron.resharding.hf_layout import SINGLE
from dapo_megatron.scratch import random_weights, scratch_config

VOCABULARY = 500  # no multiple of 64: the padded columns must not show
SIZES = {"hidden": 256, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 64, "ffn": 384}
POSITIONS = 512
START_LIMIT_S = 3600.0  # the limit of the part comes first
STD = 0.06  # about 1/√hidden: matrices neither amplify nor damp


@dataclass(frozen=True)
class Trial:
    """What the parts are told. vocabulary: columns of the recipe's logits. needed: part → the setting that needs it;
    idle: part → why the recipe has no use for it."""

    family: str = "qwen2"
    tied: bool = False
    device: str = "auto"
    temperature: float = 1.0
    eps_low: float = 0.2
    eps_high: float = 0.28
    vocabulary: int = 151936
    needed: dict[str, str] = field(default_factory=dict)
    idle: dict[str, str] = field(default_factory=dict)


def trial_of(recipe: Recipe | None) -> Trial:
    """A recipe's trial; without one Qwen2.5's.

    Raises:
        RequestError: the recipe's model folder.
    """
    if recipe is None:
        return Trial()
    architecture = planned_architecture(recipe, folder_needed=False)
    needed = {}
    if recipe.learner.loss_kernel == "triton":
        needed["kernels"] = "learner.loss_kernel=triton"
    if recipe.model.layer_spec == "transformer_engine":
        needed["layers"] = "model.layer_spec=transformer_engine"
    if recipe.rollout.engine == "vllm" and not recipe.rollout.servers:
        needed["engine"] = "rollout.engine=vllm"
    idle = {}
    if recipe.rollout.engine == "hf" and recipe.reward.judge.engine != "vllm":
        idle["engine"] = "the recipe asks for no vLLM: rollout.engine=hf"
    if recipe.model.layer_spec == "local":
        idle |= dict.fromkeys(("parameters", "layers"), "the recipe asks for local layers: model.layer_spec=local")
    if recipe.learner.loss_kernel == "torch":
        idle["kernels"] = "the recipe asks for torch's kernels: learner.loss_kernel=torch"
    return Trial(
        family=architecture.family,
        tied=architecture.tied,
        device=recipe.learner.device,
        temperature=recipe.rollout.temperature or 1.0,
        eps_low=recipe.algorithm.eps_low,
        eps_high=recipe.algorithm.eps_high,
        vocabulary=architecture.vocab,
        needed=needed,
        idle=idle,
    )


def write_trial(trial: Trial, folder: Path) -> None:
    """The trial, config.json and fp32 weights into `folder`; norms and biases are random too, so that none is idle."""
    from safetensors.numpy import save_file

    scratch = Scratch(family=trial.family, tied=trial.tied, max_positions=POSITIONS, init_std=STD, **SIZES)
    config = scratch_config(scratch.model_copy(update={"vocab_multiple": 1}), vocabulary=VOCABULARY, eos_token=0)
    (folder / "config.json").write_text(json.dumps(config))
    weights = random_weights(architecture_from_dict(config, "the doctor's model"), std=STD, seed=0)
    rng = np.random.default_rng(1)
    for name, values in weights.items():
        if values.ndim == 1:
            weights[name] = values + 0.2 * rng.standard_normal(values.shape, dtype=np.float32)
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})
    (folder / "trial.json").write_text(json.dumps(asdict(trial)))


def read_trial(folder: Path) -> Trial:
    """The inverse of `write_trial`."""
    return Trial(**json.loads((folder / "trial.json").read_text()))


def read_tiny(folder: Path) -> Architecture:
    """The tiny model's architecture."""
    return architecture_from_dict(json.loads((folder / "config.json").read_text()), str(folder / "config.json"))


def tiny_recipe(trial: Trial, folder: Path, **changes: dict[str, Any]) -> Recipe:
    """A recipe of the tiny model on one rank; `changes`: section → settings."""
    sections: dict[str, dict[str, Any]] = {
        "run": {"directory": str(folder / "run")},
        "model": {"path": str(folder), "dtype": "fp32", "layer_spec": "local"},
        "rollout": {
            "prompts_per_step": 4,
            "samples_per_prompt": 2,
            "max_response_length": 32,
            "max_batch_sequences": 16,
            "temperature": trial.temperature,
            "gpu_memory_share": 0.3,
            "start_limit_s": START_LIMIT_S,
        },
        "algorithm": {"mini_batch_prompts": 4},
        "optimizer": {"distributed": False},
        "learner": {"tokens_per_micro_batch": 512, "device": trial.device},
    }
    for section, settings in changes.items():
        sections[section] = sections.get(section, {}) | settings
    return Recipe.model_validate(sections)


def random_batch(rng: np.random.Generator, count: int = 6) -> SequenceBatch:
    """Sequences of unlike lengths, with normal advantages."""
    prompts = [rng.integers(0, VOCABULARY, int(n), dtype=np.int32) for n in rng.integers(3, 40, count)]
    responses = [rng.integers(0, VOCABULARY, int(n), dtype=np.int32) for n in rng.integers(8, 48, count)]
    batch = sequence_batch(prompts, responses)
    batch.advantages = [rng.standard_normal(len(r), dtype=np.float32) for r in responses]
    return batch
