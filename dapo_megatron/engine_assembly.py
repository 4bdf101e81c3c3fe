"""The vLLM engines of a recipe: how many, on which devices, and how weights reach them."""

import socket
from collections.abc import Collection
from urllib.parse import urlsplit

import torch.distributed as dist

from dapo_megatron.config import Architecture, Layout, Recipe
from dapo_megatron.config.derive import derive_engines
from dapo_megatron.engine_sync import EngineSync
from dapo_megatron.errors import RequestError
from dapo_megatron.launch import World
from dapo_megatron.learner.learner import Learner
from dapo_megatron.prepare import RunPaths
from dapo_megatron.resharding.bridge import Bridge
from dapo_megatron.rollout.launcher import EngineSettings, engine_settings
from dapo_megatron.rollout.server_dispatcher import ServerDispatcher
from dapo_megatron.rollout.vllm_engines import VLLMEngines, visible_devices


def assemble_engines(
    recipe: Recipe,
    architecture: Architecture,
    layout: Layout,
    world: World,
    learner: Learner,
    paths: RunPaths,
    stop_tokens: Collection[int],
) -> tuple[VLLMEngines, EngineSync, ServerDispatcher]:
    """Start the engines (they get ready in the background) and connect them with the learner; collective."""
    rollout = recipe.rollout
    count = derive_engines(recipe, layout, cpu=learner.device.type == "cpu")
    one_machine = _on_one_machine(world)
    if rollout.placement == "disaggregated" and not one_machine and not rollout.servers:
        raise RequestError(
            "rollout.placement=disaggregated over several machines needs rollout.servers: start engines there with "
            "`dapo-megatron serve RECIPE` and name their addresses"
        )
    engines = VLLMEngines(
        rank=world.rank,
        world=world.size,
        count=count,
        settings_of=lambda engine: _settings(recipe, world, learner, paths, engine),
        host=_host(one_machine, rollout.servers),
        servers=rollout.servers,
        logs=paths.run / "engines",
        stop_tokens=stop_tokens,
        sleep=learner.device.type == "cuda" and rollout.placement == "colocated" and not rollout.servers,
        restarts=rollout.restarts,
        start_limit_s=rollout.start_limit_s,
        capacity=rollout.max_batch_sequences,
    )
    bridge = Bridge(
        architecture=architecture,
        layout=layout,
        layer_spec=learner.layer_spec,
        engines=count,
        tensor=rollout.tensor,
        dtype=str(learner.dtype).removeprefix("torch."),
        transport=_transport(recipe, one_machine=one_machine),
        bucket_bytes=recipe.resharding.bucket_mib << 20,
        window=recipe.resharding.window,
        time_limit_s=recipe.resharding.time_limit_s,
    )
    sync = EngineSync(recipe, learner, engines, bridge)
    dispatcher = ServerDispatcher(
        engines, rank=world.rank, world=world.size, time_limit_s=rollout.time_limit_s, refill=sync.refill
    )
    return engines, sync, dispatcher


def _settings(recipe: Recipe, world: World, learner: Learner, paths: RunPaths, engine: int) -> EngineSettings:
    """How this rank starts engine `engine`.

    A colocated engine takes the devices of this rank and those after it, a disaggregated one of those behind the
    learner's.
    """
    if learner.device.type != "cuda":
        return engine_settings(recipe, paths.model, None)
    size = recipe.rollout.tensor
    apart = recipe.rollout.placement == "disaggregated"
    first = world.size + engine * size if apart else world.local_rank
    return engine_settings(recipe, paths.model, visible_devices(range(first, first + size)))


def _on_one_machine(world: World) -> bool:
    if world.size == 1:
        return True
    names: list = [None] * world.size
    dist.all_gather_object(names, socket.gethostname())
    return len(set(names)) == 1


def _host(one_machine: bool, servers: Collection[str]) -> str:
    """Where this rank's engines and rank 0's store listen: the loopback, unless other machines must reach them."""
    loopback = all(urlsplit(server).hostname in ("127.0.0.1", "localhost") for server in servers)
    return "127.0.0.1" if one_machine and loopback else socket.gethostbyname(socket.gethostname())


def _transport(recipe: Recipe, *, one_machine: bool) -> str:
    setting, rollout = recipe.resharding.transport, recipe.rollout
    if setting == "shared" and not one_machine:
        raise RequestError("resharding.transport=shared needs learner and engines on one machine; use group or auto")
    if setting != "auto":
        return setting
    return "shared" if one_machine and rollout.placement == "colocated" and not rollout.servers else "group"
