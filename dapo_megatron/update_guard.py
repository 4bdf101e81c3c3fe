"""Updates that must not be made (`optimizer.guard`): a loss or gradient that is not finite, a spike of either.

With medians over the latest updates that were made, m of gradient norms, l of losses, d of |loss − l|:

    skip when  norm or loss is not finite,  norm > norm_spike · m,  |loss − l| > loss_spike · d > 0

Every rank judges the same numbers, so all of them skip alike. What is judged follows from the state of a checkpoint, so
a resumed run skips what an uninterrupted one would have skipped.
"""

import math
from collections.abc import Callable, Sequence
from statistics import median

from dapo_megatron.config.optimizer import Guard
from dapo_megatron.data.completions import PromptGroup
from dapo_megatron.errors import RunError
from dapo_megatron.learner.learner import GradientNorm, Learner


class UpdateGuard:
    """Judges the updates of one model. `part`: its name in what is told.

    `skipped`: records of updates skipped since `take`, for a file; `total`: all of the run.
    """

    def __init__(self, settings: Guard, part: str) -> None:
        self.settings, self.part = settings, part
        self.skipped: list[dict] = []
        self.total = 0
        self._norms: list[float] = []
        self._losses: list[float] = []
        self._latest: list[int | None] = []  # the step of a skip, None for an update that was made

    def judge(self, loss: float, norm: GradientNorm, step: int) -> str | None:
        """Why this update must be skipped, None if it is to be made; either is remembered."""
        reason = self._reason(loss, norm)
        self._latest = [*self._latest, None if reason is None else step][-self.settings.among :]
        if reason is None:
            self._norms = [*self._norms, norm.value][-self.settings.window :]
            self._losses = [*self._losses, *([loss] if math.isfinite(loss) else [])][-self.settings.window :]
        else:
            self.total += 1
        return reason

    def begin_anew(self) -> None:
        """Forget the latest updates; skips stay counted."""
        self._norms, self._losses, self._latest = [], [], []

    @property
    def exhausted(self) -> bool:
        """Whether so many of the latest updates were skipped that the run must end."""
        return len(self._skips()) >= self.settings.most_skips

    @property
    def first_of_latest(self) -> int:
        """The step of the earliest skip among the latest updates."""
        return min(self._skips())

    def take(self) -> list[dict]:
        """The records since the last call."""
        taken, self.skipped = self.skipped, []
        return taken

    def state(self) -> dict:
        """What a checkpoint keeps."""
        return {"norms": self._norms, "losses": self._losses, "latest": self._latest, "total": self.total}

    def load_state(self, state: dict) -> None:
        """Stand where `state` was taken, under the present settings."""
        window, among = self.settings.window, self.settings.among
        self._norms, self._losses = list(state["norms"][-window:]), list(state["losses"][-window:])
        self._latest, self.total = list(state["latest"][-among:]), state["total"]

    def _skips(self) -> list[int]:
        return [step for step in self._latest if step is not None]

    def _reason(self, loss: float, norm: GradientNorm) -> str | None:
        settings = self.settings
        if not math.isfinite(norm.value) or not math.isfinite(loss):
            if not settings.non_finite:
                return None
            broken = "the gradient norm" if not math.isfinite(norm.value) else f"the loss is {loss}, its gradient norm"
            return f"{broken} is {norm.value:g}{f' ({norm.noticed})' if norm.noticed else ''}"
        if len(self._norms) < settings.window // 2:
            return None
        usual = median(self._norms)
        if settings.norm_spike is not None and norm.value > settings.norm_spike * usual:
            return f"the gradient norm {norm.value:.3g} is above norm_spike={settings.norm_spike:g} times {usual:.3g}"
        if settings.loss_spike is None or not self._losses:
            return None
        middle = median(self._losses)
        spread = median(abs(one - middle) for one in self._losses)
        if abs(loss - middle) > settings.loss_spike * spread > 0:
            bound = f"loss_spike={settings.loss_spike:g} times {spread:.3g}"
            return f"the loss {loss:.3g} is further from {middle:.3g} than {bound}"
        return None


def guarded_update(
    learner: Learner,
    guard: UpdateGuard | None,
    loss: float,
    *,
    learning_rate: float,
    weight_decay: float,
    step: int,
    batch: Callable[[], dict],
) -> float | None:
    """One optimizer step from the gradient buffers, if the guard lets it pass; collective.

    Args:
        loss: of these gradients, the same number on every rank.
        step: the step it belongs to, counted from 1 in a run's metrics.
        batch: what a record says of the mini-batch.

    Returns:
        The gradient's global norm before clipping; None when the update was skipped.

    Raises:
        RunError: as `Learner.step`, and for a loss that is not finite, where the guard does not look at them.
    """
    if guard is None:
        return learner.step(learning_rate, weight_decay)
    norm = learner.gradient_norm()
    reason = guard.judge(loss, norm, step)
    if reason is None:
        if not math.isfinite(loss):  # the norm is looked at by `update`
            raise RunError(
                f"the loss is {loss}: stopped before the damage spreads; resume from the last checkpoint",
                on_every_rank=True,
            )
        learner.update(norm, learning_rate, weight_decay)
        return norm.value
    guard.skipped.append(
        {"step": step, "part": guard.part, "reason": reason, "loss": loss, "grad_norm": norm.value}
        | {"learning_rate": learning_rate, **batch()}
    )
    return None


def described(groups: Sequence[PromptGroup], sequences: Sequence[int]) -> dict:
    """The responses of a mini-batch, by prompt: which, how long (tokens), rewarded with what.
    `sequences`: their numbers, counted through all of `groups`."""
    chosen, first, found = set(sequences), 0, []
    for group in groups:
        places = [i for i in range(len(group.completions)) if first + i in chosen]
        first += len(group.completions)
        if places:
            completions = [group.completions[i] for i in places]
            found.append(
                {
                    "prompt": group.prompt_id,
                    "responses": places,
                    "tokens": [len(completion.tokens) for completion in completions],
                    "rewards": [float(group.rewards[i]) for i in places],
                }
            )
    return {"groups": found}
