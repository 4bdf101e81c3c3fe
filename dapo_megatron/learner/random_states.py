"""The states of a rank's random number generators, as tensors for a file: torch on CPU and GPU, megatron's tracker,
numpy, Python.

Samples have seeds of their own and the models no dropout, so today a run draws from none of them; what draws tomorrow
continues exactly as well.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dapo_megatron.learner.parallel_groups import ParallelGroups

TRACKER = "megatron."


@dataclass(frozen=True)
class RandomStates:
    """tensors: generator → state, bytes but for numpy (int64 [624]) and Python (int64 [625]). rest: what they keep
    beside them."""

    tensors: dict[str, Tensor]
    rest: dict[str, list]


def take_random_states(device: torch.device, trackers: Mapping[str, ParallelGroups]) -> RandomStates:
    """The states of this rank, copied. `trackers`: by the name of a model its groups, which have tracked states of
    their own; models of the same groups share them."""
    name, keys, place, has_gauss, gauss = np.random.get_state()
    version, python, python_gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "python": torch.tensor(python, dtype=torch.int64),
    }
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    for prefix, groups in _prefixes(trackers).items():
        with groups.in_force():
            tracked = get_cuda_rng_tracker().get_states()
        tensors |= {prefix + key: state.clone() for key, state in tracked.items()}
    return RandomStates(tensors, {"numpy": [name, place, has_gauss, gauss], "python": [version, python_gauss]})


def restore_random_states(states: RandomStates, device: torch.device, trackers: Mapping[str, ParallelGroups]) -> None:
    """Put this rank's generators where they stood; `trackers` as when they were taken."""
    tensors, rest = states.tensors, states.rest
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
    for prefix, groups in _prefixes(trackers).items():
        tracked = {key.removeprefix(prefix): state for key, state in tensors.items() if key.startswith(prefix)}
        with groups.in_force():
            get_cuda_rng_tracker().set_states(tracked)
    name, place, has_gauss, gauss = rest["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), place, has_gauss, gauss))
    version, python_gauss = rest["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), python_gauss))


def _prefixes(trackers: Mapping[str, ParallelGroups]) -> dict[str, ParallelGroups]:
    """What names of tracked states begin with: of the first model TRACKER, of others cut differently their name too."""
    found: dict[str, ParallelGroups] = {}
    for name, groups in trackers.items():
        if groups not in found.values():
            found[f"{name}.{TRACKER}" if found else TRACKER] = groups
    return found


def random_states_bytes(states: RandomStates) -> bytes:
    """The content of a safetensors file."""
    return save(states.tensors, metadata={"rest": json.dumps(states.rest)})


def read_random_states(path: Path) -> RandomStates:
    """The states of a file with such content."""
    with safe_open(path, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return RandomStates(tensors, json.loads(opened.metadata()["rest"]))
