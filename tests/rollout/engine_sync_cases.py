"""Run on ranks: a learner at TP 2 × PP 2 that trains, and real vLLM engines that get its weights."""

import os
import signal
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from dapo_megatron.config import load_recipe
from dapo_megatron.config.optimizer import Optimizer
from dapo_megatron.data.records import sequence_batch
from dapo_megatron.engine_sync import EngineSync
from dapo_megatron.errors import RunError
from dapo_megatron.learner.learner import Learner
from dapo_megatron.resharding.bridge import Bridge
from dapo_megatron.resharding.minimum import minimum_elements
from dapo_megatron.resharding.topology import Topology, topology_of
from dapo_megatron.resharding.vllm_layout import vllm_layout
from dapo_megatron.rollout.engine import RolloutRequest
from dapo_megatron.rollout.server_dispatcher import ServerDispatcher
from dapo_megatron.rollout.vllm_engines import VLLMEngines
from dapo_megatron.weight_sync import export_hugging_face
from tests.command_line import RECIPE
from tests.learner.layouts import build
from tests.learner.updates import supervised_update
from tests.resharding.collectives import Collectives
from tests.rollout.served import START_LIMIT_S, VOCAB, greedy_requests, is_greedy, settings_for
from tests.tiny_models import load_model


def trained_weights(payload: dict) -> dict:
    """Train, push, sample, twice; then a push after which a learner rank no longer has what it gave."""
    folder, scratch = Path(payload["model"]), Path(payload["scratch"])
    learner = build(str(folder), "tp2pp2", train=Optimizer())
    engines, sync, dispatcher = _rollout_side(learner, payload)
    before = {key: tensor.clone() for key, tensor in learner.weights.items()}
    found: dict = {"greedy": [], "gaps": [], "bytes": [], "moved": True, "versions": [], "collectives": []}
    try:
        for version in range(2):
            for step in range(3):
                supervised_update(learner, _random_batch(10 * version + step), 1e-2, 0.0)
            moved = all(not torch.equal(before[key], tensor) for key, tensor in learner.weights.items())
            found["moved"] &= moved and version == sync.version + 1
            with Collectives() as passed:
                found["bytes"].append(sync.push(version).bytes_sent)
            found["collectives"].append(passed.bytes)
            requests = greedy_requests(first_ticket=100 * version)
            sampled = [_sampled(r) for r in requests]
            completions = dispatcher.generate([*requests, *sampled])
            greedy, drawn = completions[:16], completions[16:]
            found["versions"].append(sorted({int(v) for c in completions for v in c.policy_versions}))
            batch = sequence_batch([r.prompt_tokens for r in sampled], [c.tokens for c in drawn])
            mine = np.concatenate(learner.score(batch)[0])
            found["gaps"].append(float(np.abs(mine - np.concatenate([c.logprobs for c in drawn])).max()))
            export_hugging_face(learner, scratch / f"hf{version}", side_files=folder, time_limit_s=60)
            model = load_model(scratch / f"hf{version}")
            found["greedy"].append(
                sum(is_greedy(model, r.prompt_tokens, c.tokens) for r, c in zip(requests, greedy, strict=True))
            )
        found["minimum"] = 4 * sum(_minimum(sync.bridge).values())
        found["told"] = _push_and_change(learner, sync)
        sync.push(3)  # and the next one is good again
        again = dispatcher.generate(greedy_requests(first_ticket=900))
        found["versions"].append(sorted({int(v) for c in again for v in c.policy_versions}))
        if payload["kill"]:
            for process in engines.own.values() if dist.get_rank() == engines.owner(1) else ():
                os.kill(process.pid, signal.SIGKILL)
            anew = dispatcher.generate(greedy_requests(first_ticket=1900))
            found["anew"] = [a.tokens.tolist() == b.tokens.tolist() for a, b in zip(again, anew, strict=True)]
            found["restarts left"] = engines.restarts_left
    finally:
        sync.close()
        engines.close()
    return found


def _rollout_side(learner: Learner, payload: dict) -> tuple[VLLMEngines, EngineSync, ServerDispatcher]:
    rank, world, count, tensor = dist.get_rank(), dist.get_world_size(), payload["engines"], payload["tensor"]
    folder, scratch = Path(payload["model"]), Path(payload["scratch"])
    engines = VLLMEngines(
        rank=rank, world=world, count=count, settings_of=lambda _: settings_for(folder, tensor), host="127.0.0.1",
        servers=[], logs=scratch / "engines", stop_tokens=[], restarts=int(payload["kill"]),
        start_limit_s=START_LIMIT_S, time_limit_s=240, capacity=32, sleep=False,
    )  # fmt: skip
    bridge = Bridge(
        architecture=learner.architecture, layout=learner.layout, layer_spec="local", engines=count, tensor=tensor,
        dtype="float32", transport=payload["transport"], bucket_bytes=1 << 18, window=32, time_limit_s=60,
        topology=_topology(engines, payload),
    )  # fmt: skip
    recipe = load_recipe(RECIPE, ["resharding.verify=always", "resharding.time_limit_s=60"])
    sync = EngineSync(recipe, learner, engines, bridge)
    return engines, sync, ServerDispatcher(engines, rank=rank, world=world, time_limit_s=240, refill=sync.refill)


def _topology(engines: VLLMEngines, payload: dict) -> Topology | None:
    """For "relay" two machines, a pipeline stage each."""
    if payload["transport"] != "relay":
        return None
    owners = [engines.owner(e) for e in range(engines.count)]
    return topology_of([0, 0, 1, 1], owners, tensor=payload["tensor"], devices=True)


def _random_batch(seed: int):
    generator = np.random.default_rng(seed)
    prompts = [generator.integers(0, VOCAB, 6).astype(np.int32) for _ in range(8)]
    return sequence_batch(prompts, [generator.integers(0, VOCAB, 40).astype(np.int32) for _ in range(8)])


def _sampled(request: RolloutRequest) -> RolloutRequest:
    return RolloutRequest(request.ticket + 50, request.prompt_tokens, request.seed, max_new_tokens=30)


def _minimum(bridge: Bridge) -> dict[int, int]:
    from dapo_megatron.resharding.megatron_layout import megatron_layout

    source = megatron_layout(bridge.architecture, bridge.layout, layer_spec="local")
    target = vllm_layout(
        bridge.architecture, engines=bridge.engines, tensor=bridge.tensor, first_rank=bridge.layout.world
    )
    return minimum_elements(source, target)


def _push_and_change(learner: Learner, sync: EngineSync) -> str:
    """What a push says when one bit of rank 2's weights changes between the transfer and the comparison."""
    real, key = sync._outcome, "chunk0.decoder.layers.1.mlp.linear_fc2.weight"

    def outcome(*arguments):
        heard = real(*arguments)
        if dist.get_rank() == 2:
            learner.weights[key].view(torch.int32)[5, 7] ^= 1
        return heard

    sync._outcome = outcome
    try:
        sync.push(2)
        return "no error"
    except RunError as error:
        assert error.on_every_rank
        return str(error)
    finally:
        sync._outcome = real
