"""The names that a recipe's `algorithm.advantage`, `algorithm.policy_loss` and `algorithm.token_selection.kind` may
take, and what stands behind them.

Built-in methods register here as a user's own do, from a file named in `algorithm.extensions`:

    @register_advantage("mine", "A_i = R_i − max of the others")
    def mine(group: GroupRewards) -> np.ndarray: ...

    @register_policy_loss("mine", "−r·A without a clip")
    def mine(tokens: TokenBatch) -> TokenLosses | Tensor: ...

    @register_token_selection("mine", "tokens that were less likely than their entropy says")
    def mine(tokens: TokenValues, settings: SelectionSettings) -> np.ndarray: ...

Names are looked up before ranks start: nothing here imports torch.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from dapo_megatron.algorithms.keyed_random import keyed_numbers
from dapo_megatron.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

AGGREGATIONS = ("token-mean", "sequence-mean", "constant-length")
BUILT_IN = ("advantage_rules", "policy_losses", "token_selection")  # files of this room that register

Function = TypeVar("Function", bound=Callable)


@dataclass(frozen=True)
class GroupRewards:
    """What an advantage rule sees: the G responses to one prompt.

    rewards_G: fp64, in the order of the responses, shaping and penalties included.
    lengths_G: int64 tokens. epsilon: `algorithm.advantage_epsilon`.
    """

    rewards_G: np.ndarray
    lengths_G: np.ndarray
    epsilon: float


@dataclass(frozen=True)
class TokenBatch:
    """What a policy loss sees: the N trained tokens of one micro-batch, of whole sequences, or under context
    parallelism this rank's tokens of them; N may be 0 then.

    logprobs_N, entropy_N: fp32, of the present policy, with gradient; nats.
    old_logprobs_N, advantages_N, penalties_N: fp32. penalties: 0 but on tokens that a method singled out (KL-Cov).
    loss_weights_N: fp32 > 0; aggregation and importance weights. A loss need not look at them: they are applied to it.
    sequences_N: int64, which of the micro-batch's `sequences` a token belongs to.
    eps_low, eps_high, eps_dual: settings of the recipe's section `algorithm`; clips_low: its `cispo.lower_clip`.
    sum_over_ranks: sums a tensor over the ranks that share these sequences, differentiably; None where one has all.
    """

    logprobs_N: "Tensor"
    entropy_N: "Tensor"
    old_logprobs_N: "Tensor"
    advantages_N: "Tensor"
    penalties_N: "Tensor"
    loss_weights_N: "Tensor"
    sequences_N: "Tensor"
    sequences: int
    eps_low: float = 0.2
    eps_high: float = 0.28
    eps_dual: float | None = None
    clips_low: bool = False
    sum_over_ranks: "Callable[[Tensor], Tensor] | None" = None

    def log_ratio(self) -> "Tensor":
        """log π − log π_old [N], clamped to ±20, gradient 0 where the clamp is active."""
        return (self.logprobs_N - self.old_logprobs_N).clamp(-20.0, 20.0)

    def mean_of_sequence(self, values_N: "Tensor") -> "Tensor":
        """[N]: on each token the mean of `values_N` over the trained tokens of its sequence."""
        empty = values_N.new_zeros(self.sequences)
        sums = empty.index_add(0, self.sequences_N, values_N)
        counts = empty.index_add(0, self.sequences_N, values_N.new_ones(values_N.shape))
        if self.sum_over_ranks is not None:
            sums, counts = self.sum_over_ranks(sums), self.sum_over_ranks(counts)
        return (sums / counts.clamp(min=1))[self.sequences_N]


@dataclass(frozen=True)
class TokenLosses:
    """losses_N: fp32, differentiable; the update's loss is Σ weight · (loss − entropy bonus + KL) / denominator.

    For metrics alone: ratio_N, the importance ratio (None: exp of the log-ratio); clipped_…_N bool, where a bound cut
    it (None: nowhere).
    """

    losses_N: "Tensor"
    ratio_N: "Tensor | None" = None
    clipped_low_N: "Tensor | None" = None
    clipped_high_N: "Tensor | None" = None
    clipped_dual_N: "Tensor | None" = None


@dataclass(frozen=True)
class TokenValues:
    """What a token selection sees: the N ≥ 1 trained tokens of a mini-batch, or of a part of it with
    `algorithm.statistics: micro_batch`, end to end, fp32 [N] where not said otherwise.

    samples_N, positions_N: integers ≥ 0, which response to which prompt, and the token's place in it.
    clipped_N: bool, the loss's clip leaves no gradient. key: (run seed, step, update), of random draws.
    """

    logprobs_N: np.ndarray
    entropies_N: np.ndarray
    advantages_N: np.ndarray
    clipped_N: np.ndarray
    samples_N: np.ndarray
    positions_N: np.ndarray
    key: tuple[int, int, int] = (0, 0, 0)

    def __len__(self) -> int:
        return len(self.logprobs_N)

    def uniform(self) -> np.ndarray:
        """fp64 [N] in [0, 1): random numbers that are the same for every layout, and others in every update."""
        numbers_N = keyed_numbers(self.key, self.samples_N, self.positions_N)
        return (numbers_N >> np.uint64(11)) * 2.0**-53

    def only(self, rows_N: np.ndarray) -> "TokenValues":
        """The tokens of `rows_N`, bool [N] or numbers, alone."""
        columns = {name: column[rows_N] for name, column in vars(self).items() if name != "key"}
        return replace(self, **columns)


@dataclass(frozen=True)
class SelectionSettings:
    """`algorithm.token_selection`, and the share of tokens that KL-Cov penalises (0: none)."""

    kind: str = "none"
    ratio: float = 0.2
    threshold: float = 0.9
    cov_ratio: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0
    penalised: float = 0.0


AdvantageRule = Callable[[GroupRewards], np.ndarray]
LossRule = Callable[[TokenBatch], "TokenLosses | Tensor"]
SelectionRule = Callable[[TokenValues, SelectionSettings], np.ndarray]


@dataclass(frozen=True)
class AdvantageMethod:
    """A registered advantage rule: one number a response, finite. `least_samples`: responses a prompt it needs."""

    name: str
    description: str
    compute: AdvantageRule
    least_samples: int


@dataclass(frozen=True)
class LossMethod:
    """A registered policy loss. `aggregations`: values of algorithm.loss_aggregation it makes sense with, and `reason`
    why no others; `dual_clip`: whether algorithm.eps_dual means anything to it."""

    name: str
    description: str
    compute: LossRule
    aggregations: tuple[str, ...]
    reason: str
    dual_clip: bool


@dataclass(frozen=True)
class SelectionMethod:
    """A registered token selection: one bool a token, True for those that keep their gradient."""

    name: str
    description: str
    compute: SelectionRule


_advantages: dict[str, AdvantageMethod] = {}
_policy_losses: dict[str, LossMethod] = {}
_token_selections: dict[str, SelectionMethod] = {}


def register_advantage(name: str, description: str, *, least_samples: int = 2) -> Callable[[Function], Function]:
    """Decorator: `function(GroupRewards) → [G]` becomes `algorithm.advantage: name`.

    Raises:
        RequestError: the name is taken.
    """

    def register(function: Function) -> Function:
        _add(_advantages, "advantage", AdvantageMethod(name, description, function, least_samples))
        return function

    return register


def register_policy_loss(
    name: str,
    description: str,
    *,
    aggregations: tuple[str, ...] = AGGREGATIONS,
    reason: str = "",
    dual_clip: bool = False,
) -> Callable[[Function], Function]:
    """Decorator: `function(TokenBatch) → TokenLosses` or a loss a token [N] becomes `algorithm.policy_loss: name`.

    Arguments as in `LossMethod`.

    Raises:
        RequestError: the name is taken, or an aggregation is not known.
    """
    if unknown := set(aggregations) - set(AGGREGATIONS):
        raise RequestError(
            f"policy loss {name!r}: aggregation {min(unknown)!r} is not known; use {', '.join(AGGREGATIONS)}"
        )

    def register(function: Function) -> Function:
        _add(_policy_losses, "policy loss", LossMethod(name, description, function, aggregations, reason, dual_clip))
        return function

    return register


def register_token_selection(name: str, description: str) -> Callable[[Function], Function]:
    """Decorator: `function(TokenValues, SelectionSettings) → bool [N]` becomes `algorithm.token_selection.kind: name`.

    Raises:
        RequestError: the name is taken.
    """

    def register(function: Function) -> Function:
        _add(_token_selections, "token selection", SelectionMethod(name, description, function))
        return function

    return register


def advantages() -> dict[str, AdvantageMethod]:
    """All registered advantage rules by name, built-in ones first."""
    _register_built_in()
    return dict(_advantages)


def policy_losses() -> dict[str, LossMethod]:
    """All registered policy losses by name, built-in ones first."""
    _register_built_in()
    return dict(_policy_losses)


def token_selections() -> dict[str, SelectionMethod]:
    """All registered token selections by name, built-in ones first."""
    _register_built_in()
    return dict(_token_selections)


def registered() -> set[tuple[str, str]]:
    """(kind, name) of everything that is registered."""
    kinds = {"advantage": advantages(), "policy loss": policy_losses(), "token selection": token_selections()}
    return {(kind, name) for kind, methods in kinds.items() for name in methods}


def raised(error: BaseException) -> str:
    """What a method raised and where, in a few words: "KeyError('x') at mine.py:12"."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{error!r}{place}"


def _add(known: dict, kind: str, method: AdvantageMethod | LossMethod | SelectionMethod) -> None:
    if not isinstance(method.name, str) or not method.name:
        raise RequestError(f"{kind}: the name {method.name!r} must be text")
    before = known.get(method.name)
    if before is not None and _origin(before.compute) != _origin(method.compute):
        raise RequestError(f"{kind} {method.name!r} is registered already, by {_origin(before.compute)[0]}; rename it")
    known[method.name] = method


def _origin(function: Callable) -> tuple[str, str]:
    code = getattr(function, "__code__", None)
    return (code.co_filename if code else repr(function), getattr(function, "__qualname__", ""))


def _register_built_in() -> None:
    for file in BUILT_IN:  # a file registers when it is first imported
        import_module(f"dapo_megatron.algorithms.{file}")
