"""One rollout engine on the weights of a Hugging Face folder, for commands that sample without a learner."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from dapo_megatron.config import Architecture, Recipe
from dapo_megatron.config.check import cpu_engine_problem
from dapo_megatron.config.derive import vllm_tensor_problems
from dapo_megatron.errors import RequestError
from dapo_megatron.resharding.hf_files import folder_dtype
from dapo_megatron.rollout.dispatcher import Dispatcher
from dapo_megatron.rollout.hf_engine import engine_of_folder
from dapo_megatron.rollout.launcher import engine_settings
from dapo_megatron.rollout.server_dispatcher import ServerDispatcher
from dapo_megatron.rollout.vllm_engines import VLLMEngines, visible_devices
from dapo_megatron.rollout.vllm_plugin import check_vllm_version


def check_engine(recipe: Recipe, architecture: Architecture) -> None:
    """What can be refused before anything starts: vLLM missing, a tensor size that does not divide, too few GPUs.

    Raises:
        RequestError: all of it, one a line.
    """
    rollout = recipe.rollout
    if rollout.engine == "hf":
        if rollout.tensor > 1:
            raise RequestError(f"--tensor {rollout.tensor} needs --engine vllm; hf runs on one device")
        return
    check_vllm_version()
    problems = vllm_tensor_problems(rollout.tensor, architecture)
    there = torch.cuda.device_count()
    if there and rollout.tensor > there:
        problems.append(f"--tensor {rollout.tensor} needs as many GPUs and this machine shows {there}")
    if not there and (problem := cpu_engine_problem(architecture)):
        problems.append(problem)
    if problems:
        raise RequestError("\n".join(problems))


@contextmanager
def open_engine(
    recipe: Recipe,
    architecture: Architecture,
    folder: Path,
    *,
    stop_tokens: Collection[int],
    longest_prompt: int,
    logs: Path,
) -> Iterator[Dispatcher | ServerDispatcher]:
    """The queue in front of one engine of `recipe.rollout` that holds the weights of `folder`, in the folder's dtype.

    Args:
        longest_prompt: tokens; prompt and rollout.max_response_length together are what the engine makes room for.
        logs: folder for the output of vLLM's server.

    Raises:
        RunError: vLLM does not start within rollout.start_limit_s.
    """
    rollout = recipe.rollout
    if rollout.engine == "hf":
        engine = engine_of_folder(
            folder, architecture, stop_tokens=stop_tokens, max_batch_sequences=rollout.max_batch_sequences
        )
        yield Dispatcher(engine, rank=0, world=1, time_limit_s=rollout.time_limit_s)
        return
    devices = visible_devices(torch.cuda.device_count())[: rollout.tensor] if torch.cuda.is_available() else None
    settings = replace(
        engine_settings(recipe, folder, devices),
        dtype=str(folder_dtype(folder)).removeprefix("torch."),
        max_model_len=longest_prompt + rollout.max_response_length,
        sleep=False,
        load_weights=True,
    )
    engines = VLLMEngines(
        rank=0,
        world=1,
        count=1,
        settings_of=lambda _: settings,
        host="127.0.0.1",
        servers=(),
        logs=logs,
        stop_tokens=stop_tokens,
        sleep=False,
        restarts=rollout.restarts,
        start_limit_s=rollout.start_limit_s,
        time_limit_s=rollout.time_limit_s,
        capacity=rollout.max_batch_sequences,
    )

    def begin() -> None:
        engines.fleet.update_weights(0)
        engines.fleet.resume()

    try:
        engines.ready()
        begin()
        yield ServerDispatcher(engines, rank=0, world=1, time_limit_s=rollout.time_limit_s, refill=begin)
    finally:
        engines.close()
