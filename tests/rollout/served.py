"""vLLM servers on a tiny model, and one process that plays all learner ranks of a TP 2 × PP 2 world beside them."""

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from dapo_megatron.config import read_architecture
from dapo_megatron.data.completions import Completion
from dapo_megatron.errors import RunError
from dapo_megatron.resharding.bridge import Bridge
from dapo_megatron.resharding.checksum import checksum
from dapo_megatron.resharding.links import open_link
from dapo_megatron.resharding.shared_memory import export_tensors
from dapo_megatron.resharding.transport import Transfer, Transport, local_view
from dapo_megatron.rollout.engine import RolloutRequest
from dapo_megatron.rollout.fleet import Fleet
from dapo_megatron.rollout.launcher import EngineProcess, EngineSettings, wait_until_ready
from dapo_megatron.rollout.vllm_client import EngineClient
from tests.resharding.worlds import layout_for, shards
from tests.tiny_models import write_model

SECRET = "a secret for tests"
START_LIMIT_S = 400.0
VOCAB = 100
BLOCK = 128  # tokens of a KV block on a CPU
MAX_MODEL_LEN = 320
STOP_TOKEN = 7
SHAPE = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 512}


def write_models(folder: Path, count: int = 2) -> list[Path]:
    """Models that differ in their weights alone. Matrices neither amplify nor damp (0.15 · 0.6 ≈ 1 / √hidden), so that
    fp32 gives log-probs of six digits."""
    found = []
    for seed in range(count):
        model = write_model(folder / str(seed), "qwen2", tied=False, seed=seed, **SHAPE)
        tensors = load_file(model / "model.safetensors")
        scaled = {name: t * 0.6 if t.dim() > 1 else t for name, t in tensors.items()}
        save_file(scaled, model / "model.safetensors", {"format": "pt"})
        found.append(model)
    return found


def settings_for(model: Path, tensor: int) -> EngineSettings:
    return EngineSettings(model=model, dtype="float32", tensor=tensor, max_model_len=MAX_MODEL_LEN, max_sequences=32)


@contextmanager
def running_engine(settings: EngineSettings, log: Path) -> Iterator[EngineProcess]:
    """A server that answers; ended afterwards."""
    process = EngineProcess(settings, secret=SECRET, log=log)
    try:
        wait_until_ready([process], START_LIMIT_S)
        yield process
    finally:
        process.stop()


def fleet_for(*addresses: str, stop_tokens: Sequence[int] = (), capacity: int = 32) -> Fleet:
    connect = partial(EngineClient, secret=SECRET, stop_tokens=stop_tokens)
    return Fleet(connect, addresses, capacity=capacity, time_limit_s=START_LIMIT_S)


def prompts(count: int = 16, seed: int = 0) -> list[np.ndarray]:
    """Random prompts of 3 to 200 tokens; a third is longer than a KV block, and two of these have a block in common."""
    generator = np.random.default_rng(seed)
    lengths = [*generator.integers(3, 100, count - count // 3), *generator.integers(BLOCK + 2, 200, count // 3)]
    found = [generator.integers(0, VOCAB, n).astype(np.int32) for n in lengths]
    found[-1][:BLOCK] = found[-2][:BLOCK]
    return found


def greedy_requests(new: int = 20, first_ticket: int = 0) -> list[RolloutRequest]:
    return [
        RolloutRequest(first_ticket + i, p, seed=i, max_new_tokens=new, temperature=0.0)
        for i, p in enumerate(prompts())
    ]


def draw(fleet: Fleet, requests: Sequence[RolloutRequest]) -> list[Completion]:
    """All completions, in the order of the requests."""
    fleet.submit(requests)
    by_ticket = {c.ticket: c for c in fleet.collect(time_limit_s=240)}
    return [by_ticket[r.ticket] for r in requests]


@torch.no_grad()
def log_probs(model: torch.nn.Module, prompt: np.ndarray, tokens: np.ndarray, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / T) [L, V] by transformers, in the model's dtype, where each of the L tokens was drawn."""
    whole = torch.tensor([[*prompt.tolist(), *tokens.tolist()]])
    logits = model(whole).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits / temperature, dim=-1)


def is_greedy(model: torch.nn.Module, prompt: np.ndarray, tokens: np.ndarray) -> bool:
    """Whether each token is the likeliest after those before it."""
    return len(tokens) > 0 and log_probs(model, prompt, tokens).argmax(-1).tolist() == tokens.tolist()


class Learner:
    """All ranks of a learner, its weights plain tensors; does what `EngineSync` does, a step at a time."""

    def __init__(
        self, model: Path, fleet: Fleet, *, tensor: int, transport: str, engines: int = 1, time_limit_s: float = 60.0
    ) -> None:
        self.fleet = fleet
        architecture = read_architecture(model)
        layout = layout_for(architecture, tensor=2, pipeline=2)
        self.bridge = Bridge(
            architecture=architecture,
            layout=layout,
            layer_spec="local",
            engines=engines,
            tensor=tensor,
            dtype="float32",
            transport=transport,
            bucket_bytes=1 << 18,
            window=64,
            time_limit_s=time_limit_s,
        )
        self.store = dist.TCPStore(
            "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=time_limit_s)
        )
        self.updates = 0
        self.weights: dict[int, dict[str, Tensor]] = {}
        self.load(model)
        self.transports: list[Transport] = []
        self.links: list[Any] = []

    def load(self, model: Path) -> None:
        """Hold the folder's weights, in place."""
        whole = load_file(model / "model.safetensors")
        for rank, tensors in shards(self.bridge.architecture, self.bridge.layout, whole).items():
            held = self.weights.setdefault(rank, tensors)
            for key, tensor in tensors.items():
                held[key].copy_(tensor)

    def workers(self) -> list[int]:
        return list(range(self.bridge.layout.world, self.bridge.places))

    def join(
        self, epoch: str, bridge: Bridge | None = None, *, forge: Callable[[str], str] = str
    ) -> dict[int, dict[str, Any]]:
        """Meet the workers; returns what each of them said. `forge` changes what rank 2 says about its memory."""
        self.epoch, bridge = epoch, bridge or self.bridge
        if bridge.transport == "shared":
            self.exports = [export_tensors(tensors) for tensors in self.weights.values()]
            for rank, export in enumerate(self.exports):
                described = json.dumps(export.describe())
                self.store.set(f"{epoch}/export/{rank}", forge(described) if rank == 2 else described)
        pending = self.fleet.start(self.fleet.at_each(partial(self._init, bridge=bridge)))
        if bridge.transport == "group":
            self.links = self._on_all_ranks(
                lambda rank: open_link(
                    self.store.clone(), rank, bridge.places, device=torch.device("cpu"),
                    time_limit_s=bridge.time_limit_s, prefix=epoch,
                )
            )  # fmt: skip
            self.transports = [
                Transport(
                    bridge.plan, rank, dtype=torch.float32, device=torch.device("cpu"),
                    bucket_bytes=bridge.bucket_bytes, window=bridge.window, time_limit_s=bridge.time_limit_s, link=link,
                )
                for rank, link in enumerate(self.links)
            ]  # fmt: skip
        answers = self.heard("joined")
        pending.result(30)
        return answers

    async def _init(self, client: EngineClient, bridge: Bridge) -> None:
        info = {
            "bridge": bridge.to_json(), "engine": 0, "host": "127.0.0.1", "port": self.store.port, "epoch": self.epoch,
        }  # fmt: skip
        await client.post("/init_weight_transfer_engine", {"init_info": info}, time_limit_s=100)

    def move(self, *, verify: bool = True, silent: Sequence[int] = ()) -> dict[int, dict[str, Any]]:
        """Pause, and move the weights; returns each worker's answer. Ranks in `silent` do not take part."""
        self.updates += 1
        uid = f"update{self.updates}"
        self.fleet.pause()
        pending = self.fleet.start(self.fleet.at_each(partial(self._update, uid=uid, verify=verify)))
        self.sent: list[Transfer] = []
        problems: list[str] = []

        def send(rank: int) -> None:
            if rank not in silent:
                try:
                    self.sent.append(self.transports[rank].run(self.weights[rank], {}))
                except RunError as error:
                    problems.append(str(error))

        if self.transports:
            self._on_all_ranks(send)
        answers = self.heard(f"done/{uid}")
        pending.result(30)
        self.problems = problems
        return answers

    async def _update(self, client: EngineClient, uid: str, verify: bool) -> None:
        await client.post("/start_weight_update", time_limit_s=30)
        info = {"uid": uid, "verify": verify}
        await client.post("/update_weights", {"update_info": info}, time_limit_s=self.bridge.time_limit_s + 30)
        await client.post("/finish_weight_update", time_limit_s=30)

    def finish(self, version: int) -> None:
        """Tokens from now on belong to `version`; generation goes on."""
        self.fleet.update_weights(version)
        self.fleet.resume()

    def push(self, version: int) -> dict[int, dict[str, Any]]:
        """The whole of an update, which must succeed with equal checksums."""
        answers = self.move()
        assert [a["error"] for a in answers.values()] == [None] * len(self.workers())
        for place, answer in answers.items():
            assert answer["sums"] == self.expected_sums(place)
        self.finish(version)
        return answers

    def expected_sums(self, place: int) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for m in self.bridge.plan.moves:
            if m.target_rank == place:
                view = local_view(self.weights[m.source_rank], m.source_key, m.source_offset, m.shape)
                found.setdefault(str(m.source_rank), []).append(checksum(view))
        return found

    def heard(self, key: str) -> dict[int, dict[str, Any]]:
        names = {place: f"{self.epoch}/{key}/{place}" for place in self.workers()}
        self.store.wait(list(names.values()), timedelta(seconds=self.bridge.time_limit_s + 40))
        return {place: json.loads(self.store.get(name)) for place, name in names.items()}

    def close(self) -> None:
        for link in self.links:
            link.close()
        self.links, self.transports = [], []

    def with_bridge(self, **changes: Any) -> Bridge:
        """The bridge with another architecture: what a worker would be told by the learner of another model."""
        return replace(self.bridge, architecture=replace(self.bridge.architecture, **changes))

    def _on_all_ranks(self, work: Callable[[int], Any]) -> list[Any]:
        with ThreadPoolExecutor(self.bridge.layout.world) as threads:
            return list(threads.map(work, range(self.bridge.layout.world)))


def logprob_gap(model: torch.nn.Module, request: RolloutRequest, completion: Completion) -> float:
    """Largest |log π by vLLM − by transformers in fp64| over the sampled tokens of a completion."""
    table = log_probs(copy.deepcopy(model).double(), request.prompt_tokens, completion.tokens, request.temperature)
    expected = table[torch.arange(len(completion.tokens)), torch.as_tensor(completion.tokens).long()]
    return float((torch.as_tensor(completion.logprobs) - expected).abs().max())


def worker_tensors(learner: Learner, tensor: int, canonical: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """What each worker must hold of the canonical tensors, padding as 0."""
    from tests.resharding.worlds import PADDING, vllm_worker

    found = [vllm_worker(learner.bridge.architecture, dict(canonical), tensor, t) for t in range(tensor)]
    for local in found:
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            local[name][(local[name] == PADDING).all(dim=1)] = 0
    return found
