"""The vLLM engines of a recipe: how many, on which devices, and how weights reach them."""

import os
import socket
from collections.abc import Collection, Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

import torch

from dapo_megatron.agreement import everyone
from dapo_megatron.config import Recipe
from dapo_megatron.config.derive import derive_engines, engine_owners
from dapo_megatron.engine_sync import EngineSync
from dapo_megatron.errors import RequestError
from dapo_megatron.launch import World
from dapo_megatron.learner.learner import Learner
from dapo_megatron.prepare import RunPaths
from dapo_megatron.resharding.bridge import Bridge
from dapo_megatron.resharding.topology import Topology, topology_of
from dapo_megatron.rollout.launcher import EngineSettings, engine_settings
from dapo_megatron.rollout.server_dispatcher import ServerDispatcher
from dapo_megatron.rollout.vllm_engines import VLLMEngines, visible_devices

LOOPBACK = ("127.0.0.1", "localhost")


def assemble_engines(
    recipe: Recipe,
    world: World,
    learner: Learner,
    paths: RunPaths,
    stop_tokens: Collection[int],
) -> tuple[VLLMEngines, EngineSync, ServerDispatcher]:
    """Start the engines (they get ready in the background) and connect them with the learner; collective.

    Raises:
        RequestError: engines that cannot stand where the recipe wants them, or cannot get weights that way.
    """
    rollout = recipe.rollout
    count = derive_engines(recipe, learner.layout, cpu=learner.device.type == "cpu")
    machines = everyone(socket.gethostname(), world.size)
    one_machine = len(set(machines)) == 1
    transport = _transport(recipe, learner, one_machine=one_machine)
    topology = _topology(recipe, world.size, machines, count, devices=learner.device.type == "cuda")
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
        host=_host(one_machine, rollout.servers, world.size),
        servers=rollout.servers,
        logs=paths.run / "engines",
        stop_tokens=stop_tokens,
        sleep=learner.device.type == "cuda" and rollout.placement == "colocated" and not rollout.servers,
        restarts=rollout.restarts,
        start_limit_s=rollout.start_limit_s,
        time_limit_s=rollout.time_limit_s,
        capacity=rollout.max_batch_sequences,
        tensor=rollout.tensor if topology is not None else 1,
    )
    bridge = Bridge(
        architecture=learner.architecture,
        layout=learner.layout,
        layer_spec=learner.layer_spec,
        engines=count,
        tensor=rollout.tensor,
        dtype=str(learner.dtype).removeprefix("torch."),
        transport=transport,
        bucket_bytes=recipe.resharding.bucket_mib << 20,
        window=recipe.resharding.window,
        time_limit_s=recipe.resharding.time_limit_s,
        topology=topology,
    )
    sync = EngineSync(recipe, learner, engines, bridge)
    dispatcher = ServerDispatcher(
        engines, rank=world.rank, world=world.size, time_limit_s=rollout.time_limit_s, refill=sync.refill
    )
    return engines, sync, dispatcher


def _settings(recipe: Recipe, world: World, learner: Learner, paths: RunPaths, engine: int) -> EngineSettings:
    """How this rank starts engine `engine`.

    A colocated engine takes the devices of this rank and those after it, and sees the others of the machine, whose
    memory it reads weights from; a disaggregated one takes devices behind those of the learner.

    Raises:
        RequestError: this machine does not have these devices.
    """
    if learner.device.type != "cuda":
        return engine_settings(recipe, paths.model, None)
    size, there = recipe.rollout.tensor, torch.cuda.device_count()
    apart = recipe.rollout.placement == "disaggregated"
    first = world.size + engine * size if apart else world.local_rank
    if first + size > there:
        raise RequestError(
            f"rollout.tensor={size} for engine {engine} needs GPUs {first} to {first + size - 1} and this machine "
            f"shows {there}; use smaller rollout.tensor or rollout.engines"
        )
    names = visible_devices(there)
    own = names[first : first + size]
    others = () if apart else tuple(name for name in names if name not in own)
    return engine_settings(recipe, paths.model, own + others)


def _topology(recipe: Recipe, world: int, machines: Sequence[str], count: int, *, devices: bool) -> Topology | None:
    """Where ranks and workers stand; None where engines stand elsewhere, or weights are sent to each of them.

    Raises:
        RequestError: engines that would leave their machine, or share devices.
    """
    rollout = recipe.rollout
    if rollout.placement != "colocated" or rollout.servers or recipe.resharding.transport == "group":
        return None
    owners = engine_owners(count, tensor=rollout.tensor, world=world)
    return topology_of(machines, owners, tensor=rollout.tensor, devices=devices)


def _host(one_machine: bool, servers: Sequence[str], world: int) -> str:
    """Where this rank's engines and rank 0's store listen: the loopback, unless other machines must reach them.

    Collective: where a machine knows itself only by a loopback address, as some name their own host, the others tell.
    """
    outside = [name for name in (urlsplit(server).hostname for server in servers) if name not in LOOPBACK]
    if one_machine and not outside:
        return LOOPBACK[0]
    name = outside[0] if outside else os.environ["MASTER_ADDR"]
    problem, own, known = None, "", ""
    try:
        known = socket.gethostbyname(name)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing; tells the way there
            probe.connect((known, 9))
            own = probe.getsockname()[0]
    except OSError as error:
        problem = (
            f"{socket.gethostname()} finds no way to {name} ({error}); set MASTER_ADDR to an address all can reach"
        )
    told = everyone((problem, known), world)
    if problems := [text for text, _ in told if text is not None]:
        raise RequestError("\n".join(dict.fromkeys(problems)))
    return reachable(own, [address for _, address in told])


def reachable(own: str, known: Sequence[str]) -> str:
    """`own`, or where that is a loopback address the one under which other machines know this one, the first one's."""
    others = [address for address in known if not ip_address(address).is_loopback]
    return others[0] if ip_address(own).is_loopback and others else own


def _transport(recipe: Recipe, learner: Learner, *, one_machine: bool) -> str:
    setting, rollout = recipe.resharding.transport, recipe.rollout
    if setting == "shared" and not one_machine:
        raise RequestError(
            "resharding.transport=shared needs learner and engines on one machine, and this run has several; use relay "
            "or auto"
        )
    beside = rollout.placement == "colocated" and not rollout.servers
    if setting == "group" and beside and learner.device.type == "cuda":
        raise RequestError(
            "resharding.transport=group with rollout.placement=colocated would put two ranks of one NCCL communicator "
            "on a GPU, which NCCL refuses; use resharding.transport=auto"
        )
    if setting != "auto":
        return setting
    if not beside:
        return "group"
    return "shared" if one_machine else "relay"
