"""`dapo-megatron serve`: this process becomes one vLLM engine of a recipe, on a machine of its own."""

import os
import sys

from dapo_megatron.config import Recipe, derive_layout
from dapo_megatron.config.check import check_recipe
from dapo_megatron.errors import RequestError
from dapo_megatron.prepare import planned_architecture, run_paths
from dapo_megatron.rollout.launcher import engine_command, engine_environment, engine_settings
from dapo_megatron.rollout.vllm_engines import visible_devices
from dapo_megatron.rollout.vllm_plugin import check_vllm_version
from dapo_megatron.rollout.vllm_secret import VARIABLE


def become_engine(recipe: Recipe, host: str, port: int) -> None:
    """Replace this process by vLLM's server, fit to receive the weights of a run of `recipe`.

    Only config.json of the model is read; a run that names this engine's address in rollout.servers sends the weights.

    Raises:
        RequestError: the recipe is wrong or is not for vLLM, vLLM is missing, no secret in the environment, no model
            folder yet.
    """
    if recipe.rollout.engine != "vllm":
        raise RequestError(
            f"rollout.engine={recipe.rollout.engine}: serve starts vllm engines; use rollout.engine=vllm"
        )
    architecture = planned_architecture(recipe)
    derive_layout(recipe, architecture)
    check_recipe(recipe, architecture)
    check_vllm_version()
    secret = os.environ.get(VARIABLE)
    if not secret:
        raise RequestError(
            f"{VARIABLE} must hold a secret that engines and run share; set it in both environments, for example to "
            "the output of `openssl rand -hex 32`"
        )
    model = run_paths(recipe).model
    if not (model / "config.json").is_file():
        raise RequestError(f"{model} has no config.json: a model made by the run is there once the run was laid out")
    settings = engine_settings(recipe, model, _devices(recipe))
    sys.stdout.flush()
    os.execve(sys.executable, engine_command(settings, host, port), engine_environment(settings, secret))


def _devices(recipe: Recipe) -> tuple[str, ...] | None:
    """The first rollout.tensor GPUs that this process sees; None on a CPU."""
    if recipe.learner.device == "cpu":
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    size, there = recipe.rollout.tensor, torch.cuda.device_count()
    if size > there:
        raise RequestError(f"rollout.tensor={size} exceeds the {there} GPUs seen here; use {there} or less")
    return visible_devices(there)[:size]
