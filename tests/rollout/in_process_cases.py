"""Run as a program under torchrun's variables, triton and megatron imported first: vLLM inside this process.

Usage: python -m tests.rollout.in_process_cases MODEL MODEL OUT; leaves what it found as JSON.
"""

import json
import sys
from pathlib import Path

import megatron.core  # noqa: F401  all that could get in vLLM's way comes before it
import numpy as np
import torch
import torch.distributed as dist
import triton

from dapo_megatron.errors import RunError
from dapo_megatron.resharding.bridge import Bridge
from dapo_megatron.rollout.engine import RolloutRequest
from dapo_megatron.rollout.vllm_in_process import InProcessEngine
from tests.resharding.worlds import layout_for, vllm_worker
from tests.rollout.served import greedy_requests, is_greedy, logprob_gap, settings_for
from tests.tiny_models import load_model


def main(first: Path, second: Path) -> dict:
    from safetensors.torch import load_file

    from dapo_megatron.config import read_architecture

    torch.set_num_threads(1)
    found: dict = {"triton": triton.__version__}
    engine = InProcessEngine(settings_for(first, 1), stop_tokens=[])
    architecture = read_architecture(first)
    try:
        engine.submit(greedy_requests()[:1])
    except RunError as error:
        found["before weights"] = str(error)

    def fill(folder: Path, version: int) -> None:
        local = vllm_worker(architecture, load_file(folder / "model.safetensors"), 1, 0)
        assert set(local) == set(engine.weights)
        for name, tensor in engine.weights.items():
            tensor.copy_(local[name])
        engine.update_weights(version)

    models = [load_model(first), load_model(second)]
    found["greedy"], found["gaps"] = [], []
    for version, folder in enumerate((first, second)):
        fill(folder, version)
        requests = greedy_requests(first_ticket=100 * version)
        sampled = [
            RolloutRequest(r.ticket + 50, r.prompt_tokens, r.seed, max_new_tokens=20, temperature=0.7) for r in requests
        ]
        engine.submit([*requests, *sampled])
        done = {c.ticket: c for c in engine.collect(time_limit_s=200)}
        found["greedy"].append(
            sum(is_greedy(models[version], r.prompt_tokens, done[r.ticket].tokens) for r in requests)
        )
        found["gaps"].append(max(logprob_gap(models[version], r, done[r.ticket]) for r in sampled))
    found["boundary"] = _change_after_seven_tokens(engine, fill, first, second, models)
    found["paused"] = _paused(engine)
    found["packed"] = _packed_away(engine, first)
    return found


def _change_after_seven_tokens(engine, fill, first: Path, second: Path, models) -> list:
    """Weights replaced when every request has exactly seven tokens; [versions as counts, greedy by each model]."""
    fill(first, 10)
    requests = greedy_requests(20, first_ticket=300)
    engine.submit(requests)
    for _ in range(7):
        engine.step()
    fill(second, 11)
    done = {c.ticket: c for c in engine.collect(time_limit_s=200)}
    told = []
    for request in requests:
        c = done[request.ticket]
        versions = c.policy_versions.tolist()
        old = versions.count(10)
        assert versions == [10] * old + [11] * (20 - old)
        rows = [_greedy_tokens(model, request.prompt_tokens, c.tokens) for model in models]
        told.append([old, c.tokens[:old].tolist() == rows[0][:old], c.tokens[old:].tolist() == rows[1][old:]])
    return told


def _greedy_tokens(model, prompt: np.ndarray, tokens: np.ndarray) -> list[int]:
    from tests.rollout.served import log_probs

    return log_probs(model, prompt, tokens).argmax(-1).tolist()


def _paused(engine) -> list:
    """What a paused engine says to collect; how an aborted request ends; then the other one goes on."""
    requests = greedy_requests(10, first_ticket=400)[:2]
    engine.submit(requests)
    engine.step()
    engine.pause()
    try:
        engine.collect(time_limit_s=10)
        told = "no error"
    except RunError as error:
        told = str(error)
    aborted = engine.abort([400])
    engine.resume()
    rest = engine.collect(time_limit_s=60)
    return [told, [c.finish_reason for c in aborted], [len(c.tokens) for c in aborted], [len(c.tokens) for c in rest]]


def _packed_away(engine, model: Path) -> dict:
    """What a worker tells the learner when vLLM has packed a weight away, renamed one, or keeps another dtype."""
    from dapo_megatron.config import read_architecture

    architecture = read_architecture(model)
    bridge = Bridge(
        architecture=architecture, layout=layout_for(architecture), layer_spec="local", engines=1, tensor=1,
        dtype="float32", transport="group", bucket_bytes=1 << 18, window=8, time_limit_s=5,
    )  # fmt: skip
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    worker = engine._engine.model_executor.driver_worker.worker.model_runner.model
    found = {}
    for number, change in enumerate(("packed", "renamed")):
        layer = worker.model.layers[2].mlp.down_proj
        kept = layer.weight
        if change == "packed":
            layer.weight = torch.nn.Parameter(torch.empty(0), requires_grad=False)
        else:
            del layer.weight
            layer.register_parameter("packed_weight", kept)
        info = {
            "bridge": bridge.to_json(), "engine": 0, "host": "127.0.0.1", "port": store.port, "epoch": f"e{number}",
        }  # fmt: skip
        engine.call("init_weight_transfer_engine", init_info=info)
        found[change] = json.loads(store.get(f"e{number}/joined/1"))["error"]
        layer.weight = kept
    return found


if __name__ == "__main__":
    result = main(Path(sys.argv[1]), Path(sys.argv[2]))
    Path(sys.argv[3]).write_text(json.dumps(result))
