"""The embedded engine: a whole Hugging Face model in the learner's own process, for laptops and small machines.

Decodes token by token with a KV cache, many sequences at once. The model's parameters are plain tensors (`weights`)
into which the resharding plan writes; nothing else carries weights here.
"""

import time
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dapo_megatron.config import Architecture
from dapo_megatron.data.completions import Completion
from dapo_megatron.errors import RunError
from dapo_megatron.resharding.hf_files import folder_dtype, read_placements
from dapo_megatron.resharding.hf_layout import whole_layout
from dapo_megatron.rollout.engine import PartialCompletion, RolloutRequest

COMPACT_BELOW = 0.75  # finished rows leave the batch once fewer than this share of its rows is alive


@dataclass
class _Sequence(PartialCompletion):
    """`uniforms`: the random numbers that draw its tokens, one each."""

    uniforms: np.ndarray = field(default_factory=lambda: np.empty(0))


def own_device() -> torch.device:
    """Where a process without ranks computes: the first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def engine_of_folder(
    folder: Path, architecture: Architecture, *, stop_tokens: Collection[int], max_batch_sequences: int
) -> "HFEngine":
    """An engine on `own_device` that holds the weights of a Hugging Face folder, in the folder's dtype; `architecture`
    is the folder's, which the caller has held to its weights (`check_checkpoint`)."""
    engine = HFEngine(
        folder,
        dtype=folder_dtype(folder),
        device=own_device(),
        stop_tokens=stop_tokens,
        max_batch_sequences=max_batch_sequences,
    )
    read_placements(folder, whole_layout(architecture, [0]).placements[0], engine.weights)
    engine.update_weights(0)
    return engine


class HFEngine:
    """Implements the rollout protocol of `rollout/engine.py` on one process. Work is done inside `collect`."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: torch.dtype,
        device: torch.device,
        stop_tokens: Collection[int],
        max_batch_sequences: int,
    ) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device(device):
            self.model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
        self.model.requires_grad_(False)
        self.device = device
        self.stop_tokens = frozenset(stop_tokens)
        self.max_batch_sequences = max_batch_sequences
        self.version = -1
        self._paused = False
        self._queue: deque[RolloutRequest] = deque()
        self._batch: list[_Sequence | None] = []  # one entry a cache row; None once finished
        self._cache = None
        self._next_tokens: Tensor | None = None
        self._mask_BS: Tensor | None = None
        self._positions_B: Tensor | None = None

    @property
    def weights(self) -> dict[str, Tensor]:
        """Canonical name → parameter, for the resharding plan to write into."""
        return {name: parameter.data for name, parameter in self.model.named_parameters()}

    def submit(self, requests: Sequence[RolloutRequest]) -> list[int]:
        self._queue.extend(requests)
        return [request.ticket for request in requests]

    @torch.no_grad()
    def collect(self, until: int | None = None, *, time_limit_s: float) -> list[Completion]:
        """Decode until `until` completions are there (None: until nothing is left) or the engine is paused.

        Raises:
            RunError: not done within the time limit.
        """
        deadline = time.monotonic() + time_limit_s
        done: list[Completion] = []
        while not self._paused and (until is None or len(done) < until):
            if time.monotonic() > deadline:
                left = len(self._queue) + sum(s is not None for s in self._batch)
                raise RunError(f"rollout: {left} requests unfinished after rollout.time_limit_s={time_limit_s:.0f}")
            if not any(self._batch) and not self._admit():
                break
            done.extend(self._advance())
        return done

    def abort(self, tickets: Collection[int]) -> list[Completion]:
        wanted = set(tickets)
        taken = [_Sequence(r) for r in self._queue if r.ticket in wanted]
        self._queue = deque(r for r in self._queue if r.ticket not in wanted)
        for row, sequence in enumerate(self._batch):
            if sequence is not None and sequence.request.ticket in wanted:
                taken.append(sequence)
                self._batch[row] = None
        return [sequence.completion("abort") for sequence in taken]

    def pause(self) -> None:
        self._paused = True

    def resume(self) -> None:
        self._paused = False

    def update_weights(self, version: int) -> None:
        """Tokens from now on come from the weights just written; sequences in flight keep their cache and go on."""
        self.version = version

    def _admit(self) -> bool:
        """Start the next batch from the queue: one prefill over left-padded prompts."""
        requests = [self._queue.popleft() for _ in range(min(len(self._queue), self.max_batch_sequences))]
        if not requests:
            return False
        from transformers import DynamicCache

        self._batch = [_Sequence(r, uniforms=_uniforms(r)) for r in requests]
        longest = max(len(r.prompt_tokens) for r in requests)
        tokens = np.zeros((len(requests), longest), np.int64)
        mask = np.zeros((len(requests), longest), np.int64)
        for row, request in enumerate(requests):
            tokens[row, longest - len(request.prompt_tokens) :] = request.prompt_tokens
            mask[row, longest - len(request.prompt_tokens) :] = 1
        self._cache = DynamicCache(config=self.model.config)
        self._mask_BS = torch.from_numpy(mask).to(self.device)
        self._next_tokens = torch.from_numpy(tokens).to(self.device)
        self._positions_B = None
        return True

    def _advance(self) -> list[Completion]:
        """One forward pass and one token for every live row; returns what finished."""
        if self._positions_B is None:
            positions = (self._mask_BS.cumsum(1) - 1).clamp(min=0)
        else:
            positions = self._positions_B[:, None]
        output = self.model(
            input_ids=self._next_tokens,
            attention_mask=self._mask_BS,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        tokens_B, logprobs_B = self._draw(output.logits[:, -1])
        finished = []
        for row, sequence in enumerate(self._batch):
            if sequence is None:
                continue
            sequence.tokens.append(int(tokens_B[row]))
            sequence.logprobs.append(float(logprobs_B[row]))
            sequence.versions.append(self.version)
            reason = self._reason_to_finish(sequence)
            if reason is not None:
                finished.append(sequence.completion(reason))
                self._batch[row] = None
        self._positions_B = positions[:, -1] + 1
        self._next_tokens = torch.from_numpy(tokens_B).to(self.device)[:, None]
        self._mask_BS = torch.cat([self._mask_BS, self._mask_BS.new_ones(len(self._batch), 1)], dim=1)
        self._compact()
        return finished

    def _reason_to_finish(self, sequence: _Sequence) -> str | None:
        if sequence.tokens[-1] in self.stop_tokens:
            return "stop"
        return "length" if len(sequence.tokens) >= sequence.request.max_new_tokens else None

    def _draw(self, logits_BV: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Token ids int64 [B] and their log-probs at the temperature they were drawn at, of greedy ones at 1.

        Inverse transform of each sequence's own uniform number.
        """
        temperatures_B = _temperatures(logits_BV, [None if s is None else s.request for s in self._batch])
        greedy_B = temperatures_B == 0
        scale = temperatures_B.masked_fill(greedy_B, 1.0)[:, None]
        logp_BV = torch.log_softmax(logits_BV.float() / scale, dim=-1)
        uniforms = [0.5 if s is None else s.uniforms[len(s.tokens)] for s in self._batch]
        probabilities = logp_BV.exp().double()
        top_p = np.array([1.0 if s is None else s.request.top_p for s in self._batch])
        if (top_p < 1.0).any():
            probabilities = _nucleus(probabilities, torch.from_numpy(top_p).to(self.device))
        cumulative = probabilities.cumsum(-1)
        threshold = torch.tensor(uniforms, dtype=torch.float64, device=self.device)[:, None] * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logp_BV.shape[1] - 1)
        chosen = torch.where(greedy_B[:, None], logits_BV.argmax(-1, keepdim=True), chosen)
        return chosen.squeeze(1).cpu().numpy(), logp_BV.gather(1, chosen).squeeze(1).cpu().numpy()

    def _compact(self) -> None:
        """Drop finished rows from the cache once they are many."""
        alive = [row for row, sequence in enumerate(self._batch) if sequence is not None]
        if not alive:
            self._batch, self._cache = [], None
        elif len(alive) < COMPACT_BELOW * len(self._batch):
            index = torch.tensor(alive, device=self.device)
            self._cache.batch_select_indices(index)
            self._mask_BS, self._next_tokens = self._mask_BS[index], self._next_tokens[index]
            self._positions_B = self._positions_B[index]
            self._batch = [self._batch[row] for row in alive]


def _uniforms(request: RolloutRequest) -> np.ndarray:
    return np.random.Generator(np.random.Philox(request.seed)).random(request.max_new_tokens)


def _temperatures(logits_BV: Tensor, requests: Sequence[RolloutRequest | None]) -> Tensor:
    """fp32 [B]: each row's temperature for the token that its logits are about, 0 = greedy; 1 for a row without one."""
    device = logits_BV.device
    temperatures_B = torch.tensor([1.0 if r is None else r.temperature for r in requests], device=device)
    forks = {row: r.fork for row, r in enumerate(requests) if r is not None and r.fork is not None}
    if not forks:
        return temperatures_B
    rows = torch.tensor(list(forks), device=device)
    logp_FV = torch.log_softmax(logits_BV[rows].float(), dim=-1)
    entropy_F = -(logp_FV.exp() * logp_FV).sum(-1)
    thresholds_F, hot_F = (
        torch.tensor([getattr(fork, name) for fork in forks.values()], device=device)
        for name in ("threshold", "temperature")
    )
    temperatures_B[rows] = torch.where(entropy_F > thresholds_F, hot_F, temperatures_B[rows])
    return temperatures_B


def _nucleus(probabilities_BV: Tensor, top_p_B: Tensor) -> Tensor:
    """Keep the smallest set of most probable tokens whose mass reaches top_p, zero the rest (not renormalised)."""
    ordered, index = probabilities_BV.sort(dim=-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    ordered[before >= top_p_B[:, None]] = 0.0
    return torch.zeros_like(probabilities_BV).scatter(-1, index, ordered)
