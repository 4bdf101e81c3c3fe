"""Soft overlong punishment: a response that nears the length limit loses reward gradually."""

import numpy as np
from numpy.typing import ArrayLike

from dapo_megatron.errors import RequestError


def overlong_penalties(lengths_B: ArrayLike, max_length: int, cache_length: int) -> np.ndarray:
    """R_length of DAPO (arXiv 2503.14476, eq. 13), added to the reward of each response.

        0                                          |y| ≤ max_length − cache_length
        ((max_length − cache_length) − |y|) / cache_length    in between
        −1                                         |y| > max_length

    With cache_length 0 it is a step at max_length: 0 up to it, −1 beyond.

    Args:
        lengths_B: response lengths in tokens, any shape.
        max_length: L_max in tokens, at least 1.
        cache_length: L_cache in tokens, 0 to max_length.

    Returns:
        float64 array of the shape of `lengths_B`, values in [−1, 0].

    Raises:
        RequestError: the two lengths do not fit together.
    """
    if max_length < 1:
        raise RequestError(f"reward.overlong.max_length={max_length} must be positive; use at least 1")
    if not 0 <= cache_length <= max_length:
        raise RequestError(
            f"reward.overlong.cache_length={cache_length} must lie in 0..max_length={max_length}; "
            f"use {min(max(cache_length, 0), max_length)}"
        )
    lengths = np.asarray(lengths_B, dtype=np.float64)
    if cache_length == 0:
        return np.where(lengths > max_length, -1.0, 0.0)
    return np.clip((max_length - cache_length - lengths) / cache_length, -1.0, 0.0)


def overlong_penalty(length: int, max_length: int, cache_length: int) -> float:
    """`overlong_penalties` of one response length, in tokens."""
    return float(overlong_penalties(length, max_length, cache_length))
