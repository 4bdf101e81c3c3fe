"""The states of a rank's random number generators, as tensors for a file: torch on CPU and GPU, megatron's tracker,
numpy, Python.

Samples have seeds of their own and the models no dropout, so today a run draws from none of them; what draws tomorrow
continues exactly as well.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

TRACKER = "megatron."


@dataclass(frozen=True)
class RandomStates:
    """tensors: generator → state, bytes but for numpy (int64 [624]) and Python (int64 [625]). rest: what they keep
    beside them."""

    tensors: dict[str, Tensor]
    rest: dict[str, list]


def take_random_states(device: torch.device) -> RandomStates:
    """The states of this rank, copied."""
    name, keys, place, has_gauss, gauss = np.random.get_state()
    version, python, python_gauss = random.getstate()
    tensors = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "python": torch.tensor(python, dtype=torch.int64),
    }
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    for key, state in get_cuda_rng_tracker().get_states().items():
        tensors[TRACKER + key] = state.clone()
    return RandomStates(tensors, {"numpy": [name, place, has_gauss, gauss], "python": [version, python_gauss]})


def restore_random_states(states: RandomStates, device: torch.device) -> None:
    """Put this rank's generators where they stood."""
    tensors, rest = states.tensors, states.rest
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda" and "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"], device)
    tracked = {key.removeprefix(TRACKER): state for key, state in tensors.items() if key.startswith(TRACKER)}
    get_cuda_rng_tracker().set_states(tracked)
    name, place, has_gauss, gauss = rest["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), place, has_gauss, gauss))
    version, python_gauss = rest["python"]
    random.setstate((version, tuple(tensors["python"].tolist()), python_gauss))


def random_states_bytes(states: RandomStates) -> bytes:
    """The content of a safetensors file."""
    return save(states.tensors, metadata={"rest": json.dumps(states.rest)})


def read_random_states(path: Path) -> RandomStates:
    """The states of a file with such content."""
    with safe_open(path, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return RandomStates(tensors, json.loads(opened.metadata()["rest"]))
