"""Random numbers that depend on what they are for and on nothing else: the same for every layout, device and order."""

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)


def keyed_numbers(key: tuple[int, ...], *columns_N: np.ndarray) -> np.ndarray:
    """uint64 [N], one from `key` and the N-th entries of `columns_N` (integers ≥ 0): SplitMix64 folded over them.

    Source of the mixing: G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014).
    """
    state = np.zeros(len(columns_N[0]), np.uint64)
    for part in (*key, *columns_N):
        state = _mix(state ^ _mix(np.asarray(part).astype(np.uint64) + _STEP))
    return state


def _mix(value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        value = value + _STEP
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))
