"""Which rank is slower than its like: own seconds of all ranks, gathered every few steps at the end of one.

    ratio of a rank = its own seconds / the median of the ranks of its pipeline stage

Stages differ in what they hold, so they are not compared with each other. Of an even number of ranks the lower middle
one is the median: of two ranks the slower is compared with the quicker.
"""

import socket
from collections.abc import Mapping, Sequence
from statistics import median_low
from typing import Any

import torch

from dapo_megatron.agreement import everyone
from dapo_megatron.phases import OWN, WAITING, Phases

WORK = "work"  # all phases of a step together
PROBE_SIZE, PROBE_TIMES = {"cpu": 256, "cuda": 2048}, {"cpu": 8, "cuda": 64}
PREFIX = "time/ranks"  # as other times no part of what resuming must repeat


class Stragglers:
    """Compares `world` ranks every `every` steps; 0 = never. Collective; `stage`: this rank's pipeline stage."""

    def __init__(self, phases: Phases, *, every: int, world: int, stage: int, device: torch.device) -> None:
        self.active = every > 0 and world > 1
        self._phases, self._every, self._world, self._device = phases, every, world, device
        self._places: list[tuple[str, int]] = []
        if self.active:
            self._places = everyone((socket.gethostname(), stage), world)

    def report(self, step: int) -> dict[str, Any]:
        """After step `step`: the comparison since the last one, the same on every rank; {} between two."""
        if not self.active or step % self._every:
            return {}
        probe(self._phases, self._device)
        seconds = everyone(self._phases.take(), self._world)
        return compare(seconds, [host for host, _ in self._places], [stage for _, stage in self._places])


def probe(phases: Phases, device: torch.device) -> None:
    """A piece of work that takes every sound rank of a kind equally long: 0.3 GFLOP on a CPU, 1.1 TFLOP on a GPU."""
    kind = "cuda" if device.type == "cuda" else "cpu"
    size, dtype = PROBE_SIZE[kind], torch.bfloat16 if kind == "cuda" else torch.float32
    matrix = torch.full((size, size), 1.0 / size, dtype=dtype, device=device)
    result = matrix @ matrix  # what is set up at the first call is no part of it
    if kind == "cuda":
        torch.cuda.synchronize(device)
    with phases.own("probe"):
        for _ in range(PROBE_TIMES[kind]):
            result = matrix @ result
        if kind == "cuda":
            torch.cuda.synchronize(device)


def compare(seconds: Sequence[Mapping[str, float]], hosts: Sequence[str], stages: Sequence[int]) -> dict[str, Any]:
    """Metrics `time/ranks/PHASE/…` of every phase that took any rank any time, and of `work`, their sum: median and max
    (s, over all ranks), ratio of the slowest rank to its like, its number and its host. Of waiting no rank is slowest.

    `seconds`: own seconds by phase, of each rank.
    """
    table = [{**own, WORK: sum(own[name] for name in OWN if name != "probe")} for own in seconds]
    found: dict[str, Any] = {}
    for name in (WORK, *OWN, WAITING):
        values = [own[name] for own in table]
        if max(values) <= 0.0:
            continue
        found |= {f"{PREFIX}/{name}/median": median_low(values), f"{PREFIX}/{name}/max": max(values)}
        if name != WAITING:
            ratios = [value / max(usual, 1e-9) for value, usual in zip(values, _usual(values, stages), strict=True)]
            slowest = max(range(len(ratios)), key=ratios.__getitem__)
            found |= {
                f"{PREFIX}/{name}/ratio": ratios[slowest],
                f"{PREFIX}/{name}/slowest": float(slowest),
                f"{PREFIX}/{name}/host": hosts[slowest],
            }
    return found


def _usual(values: Sequence[float], stages: Sequence[int]) -> list[float]:
    """Of each rank the median of its stage."""
    of_stage = {
        stage: median_low([value for value, other in zip(values, stages, strict=True) if other == stage])
        for stage in set(stages)
    }
    return [of_stage[stage] for stage in stages]
