"""Group advantages, and which groups carry a gradient at all."""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from dapo_megatron.errors import RequestError, RunError

METRICS = ("accuracy", "reward_std")


def group_advantages(
    rewards_BG: Tensor | ArrayLike, *, ddof: int = 1, epsilon: float = 1e-6, divide: bool = True
) -> Tensor | np.ndarray:
    """Advantage of each response within its group (GRPO, arXiv 2402.03300; DAPO, 2503.14476).

        A_bg = (R_bg − mean_g R_b) / (std_g R_b + epsilon),   std with `ddof`

    A is exactly 0 where all rewards of a group are equal, and where the group has one response.

    Args:
        rewards_BG: B groups of G rewards: a torch tensor, a numpy array or nested lists.
        ddof: std divides by G − ddof; 1 is the sample std.
        epsilon: in units of reward.
        divide: False leaves out the division (Dr.GRPO, 2503.20783): A = R − mean R.

    Returns:
        float32 [B, G], computed in float64: a tensor on the input's device for a tensor, else a numpy array.

    Raises:
        RunError: a reward is not finite.
        ValueError: not two-dimensional.
    """
    rewards = _float64(rewards_BG, "rewards_BG")
    finite = np.isfinite(rewards)
    if not finite.all():
        group, response = np.argwhere(~finite)[0]
        raise RunError(
            f"reward of response {response} in group {group} is {rewards[group, response]}; rewards must be finite"
        )
    advantages = np.zeros_like(rewards)
    varied = _varied(rewards)
    if varied.any():
        kept = rewards[varied]
        centred = kept - kept.mean(axis=1, keepdims=True)
        advantages[varied] = centred / (kept.std(axis=1, ddof=ddof, keepdims=True) + epsilon) if divide else centred
    return _like(rewards_BG, advantages.astype(np.float32))


def mixed_groups(accuracies_BG: Tensor | ArrayLike) -> Tensor | np.ndarray:
    """Which groups DAPO's dynamic sampling keeps: 0 < number right < G.

    Args:
        accuracies_BG: 1 or True where the response is right, 0 or False where it is wrong.

    Returns:
        bool [B]: a tensor on the input's device for a tensor, else a numpy array.

    Raises:
        ValueError: another value than 0 or 1, or not two-dimensional.
    """
    accuracies = _float64(accuracies_BG, "accuracies_BG")
    if not np.isin(accuracies, (0.0, 1.0)).all():
        raise ValueError("accuracies_BG must hold 0 and 1 only")
    right = accuracies.sum(axis=1)
    return _like(accuracies_BG, (right > 0) & (right < accuracies.shape[1]))


def varied_groups(rewards_BG: Tensor | ArrayLike) -> Tensor | np.ndarray:
    """Which groups have reward std > 0: those whose advantages are not all 0. bool [B], same kind as the input.

    Raises:
        ValueError: not two-dimensional.
    """
    return _like(rewards_BG, _varied(_float64(rewards_BG, "rewards_BG")))


def select_groups(
    metric: str, accuracies_BG: Tensor | ArrayLike, rewards_BG: Tensor | ArrayLike
) -> Tensor | np.ndarray:
    """Groups that dynamic sampling keeps, bool [B]: `mixed_groups` for "accuracy", `varied_groups` for "reward_std".

    Raises:
        RequestError: an unknown metric.
    """
    if metric == "accuracy":
        return mixed_groups(accuracies_BG)
    if metric == "reward_std":
        return varied_groups(rewards_BG)
    raise RequestError(f"algorithm.dynamic_sampling.metric={metric} is not known; use {' or '.join(METRICS)}")


def _varied(rewards: np.ndarray) -> np.ndarray:
    # compared, not subtracted: the std of equal floats may come out as a rounding error above 0
    return (rewards != rewards[:, :1]).any(axis=1)


def _float64(values_BG: Tensor | ArrayLike, name: str) -> np.ndarray:
    host = values_BG.detach().to("cpu", torch.float64).numpy() if isinstance(values_BG, Tensor) else values_BG
    values = np.asarray(host, dtype=np.float64)
    if values.ndim != 2:
        raise ValueError(f"{name} must have two dimensions (groups, responses), not {values.ndim}")
    return values


def _like(original: Tensor | ArrayLike, result: np.ndarray) -> Tensor | np.ndarray:
    return torch.from_numpy(result).to(original.device) if isinstance(original, Tensor) else result
