"""How good probabilities of YES are: against a truth of yes and no, and against another judge's."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

BINS = 10


@dataclass(frozen=True)
class Reliability:
    """Equal bins of P(YES) over [0, 1]: cases in each, their mean P(YES), their share of yes; NaN in empty bins."""

    counts: np.ndarray
    mean_p: np.ndarray
    share: np.ndarray


def reliability(p_B: np.ndarray, truth_B: np.ndarray, bins: int = BINS) -> Reliability:
    """The bins of B probabilities with their truths (bool)."""
    place_B = np.minimum((p_B * bins).astype(int), bins - 1)
    counts = np.bincount(place_B, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_p = np.bincount(place_B, p_B, bins) / counts
        share = np.bincount(place_B, truth_B.astype(float), bins) / counts
    return Reliability(counts, mean_p, share)


def expected_calibration_error(p_B: np.ndarray, truth_B: np.ndarray, bins: int = BINS) -> float:
    """ECE = Σ_bins n_bin / B · |share of yes − mean P(YES)|."""
    found = reliability(p_B, truth_B, bins)
    return float(np.nansum(found.counts * np.abs(found.share - found.mean_p)) / max(len(p_B), 1))


def area_under_curve(p_B: np.ndarray, truth_B: np.ndarray) -> float:
    """AUC: the chance that a yes has a greater P(YES) than a no, ties half; NaN unless both occur."""
    yes = int(truth_B.sum())
    no = len(truth_B) - yes
    if not yes or not no:
        return math.nan
    _, group, counts = np.unique(p_B, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[group]  # equal values share their mean rank, from 1
    return float((ranks[truth_B].sum() - yes * (yes + 1) / 2) / (yes * no))


@dataclass(frozen=True)
class Quality:
    """Of `cases` probabilities against a truth. accuracy: share with (P > 0.5) = truth. brier: mean (P − truth)²."""

    cases: int
    yes: float
    accuracy: float
    auc: float
    brier: float
    ece: float


def quality(p_B: np.ndarray, truth_B: np.ndarray) -> Quality:
    """The quality of B probabilities; all NaN without a case."""
    if not len(p_B):
        return Quality(0, *[math.nan] * 5)
    return Quality(
        cases=len(p_B),
        yes=float(truth_B.mean()),
        accuracy=float(((p_B > 0.5) == truth_B).mean()),
        auc=area_under_curve(p_B, truth_B),
        brier=float(((p_B - truth_B) ** 2).mean()),
        ece=expected_calibration_error(p_B, truth_B),
    )


@dataclass(frozen=True)
class Likeness:
    """Of a student to its teacher over `cases`: equal verdicts (share), mean |difference| of P(YES), correlation of
    P(YES), NaN where one of them is constant."""

    cases: int
    equal: float
    difference: float
    correlation: float


def likeness(student_B: np.ndarray, teacher_B: np.ndarray) -> Likeness:
    """The likeness of B pairs of probabilities; NaN without a pair."""
    if not len(student_B):
        return Likeness(0, *[math.nan] * 3)
    varied = np.ptp(student_B) > 0 and np.ptp(teacher_B) > 0
    return Likeness(
        cases=len(student_B),
        equal=float(((student_B > 0.5) == (teacher_B > 0.5)).mean()),
        difference=float(np.abs(student_B - teacher_B).mean()),
        correlation=float(np.corrcoef(student_B, teacher_B)[0, 1]) if varied else math.nan,
    )


def as_json(record: Quality | Likeness | Reliability) -> dict[str, Any]:
    """Plain numbers and lists; null for NaN."""
    return {name: _plain(value) for name, value in asdict(record).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [_plain(entry) for entry in value.tolist()]
    return None if isinstance(value, float) and math.isnan(value) else value
