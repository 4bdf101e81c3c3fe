"""What k graded samples a problem say about a policy: avg@k, pass@k, maj@k, and how sure the mean is."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike


def pass_at_k(right_P: ArrayLike, samples: int, k: int) -> np.ndarray:
    """Chance that at least one of k samples is right, a problem each, from `samples` ≥ k of them.

        pass@k = 1 − C(n − c, k) / C(n, k),   n samples of which c are right

    Unbiased, unlike 1 − (1 − c/n)^k (Chen et al., arXiv 2107.03374). As a product: no binomial overflows.

    Args:
        right_P: int, right samples of each problem.

    Returns:
        float64 [P].

    Raises:
        ValueError: k is not in 1..samples, or a count not in 0..samples.
    """
    counts = np.asarray(right_P, dtype=np.int64)
    if not 1 <= k <= samples:
        raise ValueError(f"k={k} must be in 1..{samples}")
    if counts.size and not (counts.min() >= 0 and counts.max() <= samples):
        raise ValueError(f"counts of right samples must be in 0..{samples}")
    # C(n−c, k) / C(n, k) = Π_{i<k} (n − c − i) / (n − i), 0 once a factor is
    i = np.arange(k)
    factors_PK = np.clip(samples - counts[:, None] - i, 0, None) / (samples - i)
    return 1.0 - factors_PK.prod(axis=1)


def majority_at_k(answers_K: Sequence[str | None], right_K: ArrayLike) -> float:
    """Whether the most frequent final answer of one problem's samples is right: 0 … 1.

    None abstains; nobody voting counts as wrong. Answers that are equally frequent share: the mean over them. Samples
    with equal answers and different verdicts (a grader that looks at more than the answer) count with their mean.

    Raises:
        ValueError: not as many verdicts as answers.
    """
    votes: dict[str, list[float]] = defaultdict(list)
    for answer, right in zip(answers_K, np.asarray(right_K, dtype=np.float64), strict=True):
        if answer is not None:
            votes[answer].append(float(right))
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    return float(np.mean([np.mean(verdicts) for verdicts in votes.values() if len(verdicts) == most]))


def clustered_standard_error(values_P: ArrayLike) -> float:
    """Standard error of a mean over P problems, each problem a cluster: std(values, ddof 1) / √P; NaN for one problem.

    Samples of a problem depend on each other, so what varies is the mean of each problem (arXiv 2411.00640).
    """
    values = np.asarray(values_P, dtype=np.float64)
    if values.size < 2:
        return float("nan")
    return float(values.std(ddof=1) / np.sqrt(values.size))
