"""Which prompt comes next: endless epochs over a data set, resumable at any point."""

from typing import TypedDict

import numpy as np

from dapo_megatron.errors import RequestError


class SamplerState(TypedDict):
    """Where a PromptSampler stands; plain numbers, for a JSON file."""

    size: int
    seed: int
    shuffle: bool
    epoch: int
    position: int


class PromptSampler:
    """Row numbers of a data set, epoch after epoch, each epoch a permutation of all rows keyed by (seed, epoch).

    Args:
        size: rows of the data set, at least 1.
        seed: at least 0.
        shuffle: False keeps the rows in file order.

    Raises:
        RequestError: an empty data set.
    """

    def __init__(self, size: int, seed: int, shuffle: bool) -> None:
        if size < 1:
            raise RequestError("the data set is empty; give one with at least 1 prompt")
        self._size, self._seed, self._shuffle = size, seed, shuffle
        self._start_epoch(0, 0)

    def take(self, n: int) -> np.ndarray:
        """The next n row numbers, int64 [n]; take(n) then take(m) equals take(n + m)."""
        parts = [np.empty(0, dtype=np.int64)]
        while n > 0:
            part = self._order[self._position : self._position + n]
            parts.append(part)
            n -= len(part)
            self._position += len(part)
            if self._position == self._size:
                self._start_epoch(self._epoch + 1, 0)
        return np.concatenate(parts)

    def state(self) -> SamplerState:
        """Enough to continue exactly here, with `load_state` on a sampler of the same size, seed and shuffle."""
        return SamplerState(
            size=self._size, seed=self._seed, shuffle=self._shuffle, epoch=self._epoch, position=self._position
        )

    def load_state(self, state: SamplerState) -> None:
        """Continue where `state` was taken.

        Raises:
            RequestError: it belongs to a data set of another size, or to another seed or shuffle.
        """
        own = {"data.train rows": self._size, "run.seed": self._seed, "data.shuffle": self._shuffle}
        saved = {"data.train rows": state["size"], "run.seed": state["seed"], "data.shuffle": state["shuffle"]}
        changed = [
            f"{name}={own[name]}, but the checkpoint was written with {saved[name]}; "
            f"use {saved[name]} to resume, or start a new run"
            for name in own
            if own[name] != saved[name]
        ]
        if changed:
            raise RequestError("\n".join(changed))
        self._start_epoch(state["epoch"], state["position"])

    def _start_epoch(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        if self._shuffle:
            self._order = np.random.default_rng([self._seed, epoch]).permutation(self._size).astype(np.int64)
        else:
            self._order = np.arange(self._size, dtype=np.int64)
