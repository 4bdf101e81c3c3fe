"""Rules that look at the metrics so far and say, in a line each, what goes wrong and why it likely does."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dapo_megatron.monitoring.metrics import finite_number

ENTROPY_SHARE, ENTROPY_FLOOR = 0.05, 0.05  # entropy in nats a token
LENGTH_SHARE = 0.3
DIVERGENCE_POINTS, TRAIN_RISE, VALIDATION_FALL = 10, 0.1, 0.05
GRADER_SHARE = 0.01  # of the responses of a step
JUDGE_SHARE = 0.05  # of what a judge is asked
STRAGGLER_RATIO, STRAGGLER_REPORTS = 1.3, 3  # times its like, comparisons in a row
VITAL = ("loss/policy", "grad_norm", "entropy/mean", "reward/mean")


def alerts_for(history: Sequence[Mapping[str, Any]], *, mismatch_bound: float | None = None) -> list[str]:
    """The alerts that hold after the last entry of `history` (metrics in step order; any key may be missing).

    - entropy collapse: entropy/mean < 0.05 of its first value and < 0.05 nats
    - length collapse: response_length/mean < 0.3 of its first value
    - divergence: between the first and the last of the last ten validation points, accuracy/train rose by at least
      0.1 and validation/accuracy fell by at least 0.05
    - mismatch: mismatch/logprob_abs_mean above `mismatch_bound` (nats; None: not looked at), or not a number
    - nothing trained: tokens/trained is 0, and not because updates were skipped
    - skipped updates: the guard skipped one in the last entry
    - not a number: loss, gradient norm, entropy or reward of the last entry is NaN or infinite
    - grader failures: more than 1 % of the last entry's responses got no verdict
    - judge fallbacks: more than 5 % of what the last entry's judge was asked got no verdict
    - straggler: in the last 3 comparisons of ranks one and the same was slowest, in all its work or in the probe, with
      at least 1.3 times the own seconds of its like
    - shortfall: the last entry trained on fewer groups than asked for
    """
    return list(_holding(history, mismatch_bound).values())


class AlertBook:
    """Remembers which alerts hold, so that each is told once until it clears.

    `history`: the metrics of the run so far, at first those of a resumed one; an alert that held then is told again.
    """

    def __init__(self, mismatch_bound: float | None = None, history: Sequence[Mapping[str, Any]] = ()) -> None:
        self._mismatch_bound = mismatch_bound
        self.history = list(history)
        self._holding: set[str] = set()

    def update(self, metrics: Mapping[str, Any]) -> list[str]:
        """Add the metrics of a step; returns the alerts that hold now and did not hold before it."""
        self.history.append(dict(metrics))
        holding = _holding(self.history, self._mismatch_bound)
        fresh = [text for kind, text in holding.items() if kind not in self._holding]
        self._holding = set(holding)
        return fresh


def _holding(history: Sequence[Mapping[str, Any]], mismatch_bound: float | None) -> dict[str, str]:
    rules = {
        "entropy": _entropy_collapse(history),
        "length": _length_collapse(history),
        "divergence": _divergence(history),
        "mismatch": _mismatch(history, mismatch_bound),
        "nothing trained": _nothing_trained(history),
        "skipped updates": _skipped_updates(history),
        "not a number": _not_a_number(history),
        "grader": _grader_failures(history),
        "judge": _judge_fallbacks(history),
        "straggler": _straggler(history),
        "shortfall": _shortfall(history),
    }
    return {kind: text for kind, text in rules.items() if text is not None}


def _entropy_collapse(history: Sequence[Mapping[str, Any]]) -> str | None:
    first, last = _first(history, "entropy/mean"), _last(history, "entropy/mean")
    if first is None or last is None or not (last < ENTROPY_SHARE * first and last < ENTROPY_FLOOR):
        return None
    return (
        f"entropy collapse: entropy/mean {last:.3g}, first {first:.3g}; the policy has stopped exploring; "
        "likely cause: optimizer.learning_rate too high or algorithm.eps_high too low"
    )


def _length_collapse(history: Sequence[Mapping[str, Any]]) -> str | None:
    first, last = _first(history, "response_length/mean"), _last(history, "response_length/mean")
    if first is None or last is None or not last < LENGTH_SHARE * first:
        return None
    return (
        f"length collapse: response_length/mean {last:.1f} tokens, first {first:.1f}; "
        "likely cause: short answers earn the reward without reasoning, or reward.overlong punishes too early"
    )


def _divergence(history: Sequence[Mapping[str, Any]]) -> str | None:
    points = _latest_rows(history, "validation/accuracy", DIVERGENCE_POINTS)
    if len(points) < DIVERGENCE_POINTS:
        return None
    window = history[points[0] :]
    train_first, train_last = _first(window, "accuracy/train"), _last(window, "accuracy/train")
    if train_first is None or train_last is None:
        return None
    fall = history[points[0]]["validation/accuracy"] - history[points[-1]]["validation/accuracy"]
    # decimals such as 0.6 - 0.5 miss 0.1 by a rounding error
    if train_last - train_first < TRAIN_RISE - 1e-9 or fall < VALIDATION_FALL - 1e-9:
        return None
    return (
        f"divergence: over {DIVERGENCE_POINTS} validations accuracy/train rose by {train_last - train_first:.2f} while "
        f"validation/accuracy fell by {fall:.2f}; "
        "likely cause: over-fitting to the training prompts or a reward that can be gamed"
    )


def _mismatch(history: Sequence[Mapping[str, Any]], bound: float | None) -> str | None:
    key = "mismatch/logprob_abs_mean"
    value = next((row[key] for row in reversed(history) if isinstance(row.get(key), int | float)), None)
    # a NaN is above every bound: the comparison is written so that it fires
    if bound is None or value is None or value <= bound:
        return None
    return (
        f"mismatch: mean |log-prob of learner - log-prob of rollout| is {value:.3g}, bound {bound:g}; "
        "likely cause: the rollout engine runs old or wrong weights, or another precision"
    )


def _nothing_trained(history: Sequence[Mapping[str, Any]]) -> str | None:
    if _last(history, "tokens/trained") != 0 or _skipped_updates(history) is not None:
        return None
    return (
        "nothing trained: tokens/trained is 0; likely cause: every group was all right or all wrong, "
        "or overlong filtering removed every response"
    )


def _skipped_updates(history: Sequence[Mapping[str, Any]]) -> str | None:
    skipped = finite_number(history[-1], "guard/skipped") if history else None
    if not skipped:
        return None
    total = finite_number(history[-1], "guard/skipped_total") or skipped
    return (
        f"skipped updates: {skipped:.0f} in this step, {total:.0f} in the run, weights are as they were; "
        "skipped_updates.jsonl says why and on what; "
        "likely cause: optimizer.learning_rate too high, or a loss or reward that is not finite; "
        "optimizer.guard.most_skips ends the run if it goes on"
    )


def _not_a_number(history: Sequence[Mapping[str, Any]]) -> str | None:
    last = history[-1] if history else {}
    broken = [key for key in VITAL if isinstance(last.get(key), float) and not math.isfinite(last[key])]
    if not broken:
        return None
    return (
        f"not a number: {' and '.join(f'{key} is {last[key]}' for key in broken)}; the weights are likely lost; "
        "likely cause: optimizer.learning_rate or optimizer.gradient_clip too high; go back to an earlier checkpoint"
    )


def _grader_failures(history: Sequence[Mapping[str, Any]]) -> str | None:
    last = history[-1] if history else {}
    failed, responses = (finite_number(last, name) for name in ("grader/failures", "responses/generated"))
    if not failed or not responses or not failed > GRADER_SHARE * responses:
        return None
    return (
        f"grader failures: {failed:.0f} of {responses:.0f} responses got no verdict and count as wrong; "
        "likely cause: reward.time_limit_s too short for this machine, or a grader that crashes"
    )


def _judge_fallbacks(history: Sequence[Mapping[str, Any]]) -> str | None:
    last = history[-1] if history else {}
    fallbacks, judged = (finite_number(last, f"judge/{name}") or 0.0 for name in ("fallbacks", "judged"))
    if not fallbacks > JUDGE_SHARE * (fallbacks + judged):
        return None
    unreachable = finite_number(last, "judge/unreachable") or 0.0
    return (
        f"judge fallbacks: {fallbacks:.0f} of {fallbacks + judged:.0f} responses got no verdict and the rule's counts; "
        "likely cause: "
        + (
            "reward.judge.url or the judge's engine is down or slow"
            if unreachable
            else "a judge or reward.judge.prompt without YES or NO"
        )
    )


def _shortfall(history: Sequence[Mapping[str, Any]]) -> str | None:
    missing = finite_number(history[-1], "groups/shortfall") if history else None
    if not missing or missing < 0:
        return None
    return (
        f"shortfall: {missing:.0f} groups fewer than rollout.prompts_per_step were trained on; "
        "likely cause: prompts too easy or too hard for the policy, or algorithm.dynamic_sampling.max_waves too low"
    )


def _straggler(history: Sequence[Mapping[str, Any]]) -> str | None:
    for work in ("probe", "work"):
        key = f"time/ranks/{work}"
        rows = _latest_rows(history, f"{key}/ratio", STRAGGLER_REPORTS)
        latest = [history[row] for row in rows]
        if len(latest) < STRAGGLER_REPORTS or len({row.get(f"{key}/slowest") for row in latest}) > 1:
            continue
        if all(row[f"{key}/ratio"] >= STRAGGLER_RATIO for row in latest):
            rank, host, ratio = latest[-1][f"{key}/slowest"], latest[-1].get(f"{key}/host"), latest[-1][f"{key}/ratio"]
            what = "a piece of work that is the same everywhere" if work == "probe" else "its own work"
            return (
                f"straggler: rank {rank:.0f} on {host} takes {ratio:.2f} times as long as its like for {what}, "
                f"{STRAGGLER_REPORTS} comparisons in a row, and all ranks wait for it; likely cause: "
                "clocks held down by heat or power, errors of memory, another process on the node; "
                f'see docs/long-runs.md, or do without it: slurm.options=["--exclude={host}"]'
            )
    return None


def _first(history: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return next((value for metrics in history if (value := finite_number(metrics, key)) is not None), None)


def _last(history: Sequence[Mapping[str, Any]], key: str) -> float | None:
    return next((value for metrics in reversed(history) if (value := finite_number(metrics, key)) is not None), None)


def _latest_rows(history: Sequence[Mapping[str, Any]], key: str, count: int) -> list[int]:
    rows: list[int] = []
    for row in range(len(history) - 1, -1, -1):
        if len(rows) == count:
            break
        if finite_number(history[row], key) is not None:
            rows.append(row)
    return rows[::-1]
