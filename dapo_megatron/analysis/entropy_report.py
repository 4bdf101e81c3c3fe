"""Token entropies of a model, and of a base model on the same text, in a few numbers.

H_t = −Σ_v π(v | t) log π(v | t), nats at temperature 1, of the distribution that token t was drawn from. Quantiles are
exact: the p-th percentile is the least value that at least p % of the tokens do not exceed. Equal values are taken in
the order of responses and tokens. Source of the measures: arXiv 2506.01939.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from dapo_megatron.algorithms.token_selection import top_share

PERCENTILES = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99)
NEAR_ZERO = 0.01  # nats; more than half of the tokens of a long chain of thought are below


def entropy_report(
    tokens_N: np.ndarray,
    entropies_N: np.ndarray,
    text_of: Callable[[int], str],
    *,
    ratio: float = 0.2,
    least_count: int = 1,
    listed: int = 20,
) -> dict[str, Any]:
    """What one model's entropies say, as a JSON-able object.

    {"tokens", "mean", "near_zero": share below 0.01 nats, "percentiles": {"50": nats},
     "top": {"ratio", "tokens", "least_entropy", "share_of_entropy"},
     "forking": [token], "steady": [token], "least_count"}
    with token = {"id", "text", "count", "mean"}: the tokens drawn where entropy is highest, and lowest, on average,
    among those that occur `least_count` times or more; at most `listed` of each, ties by id.

    Args:
        tokens_N: int, the drawn tokens; entropies_N: float, one each; N ≥ 1.
        text_of: a token's text, as it is: of a model's own making.
        ratio: in (0, 1], the share that "top" is about.
    """
    top_N = top_share(entropies_N, ratio)
    total = float(entropies_N.sum(dtype=np.float64))
    ids, means, counts = _by_token(tokens_N, entropies_N)
    often = counts >= least_count
    table = [
        {"id": int(i), "text": text_of(int(i)), "count": int(count), "mean": float(mean)}
        for i, mean, count in zip(ids[often], means[often], counts[often], strict=True)
    ]
    return {
        **_spread(entropies_N),
        "top": {
            "ratio": ratio,
            "tokens": int(top_N.sum()),
            "least_entropy": float(entropies_N[top_N].min()),
            "share_of_entropy": float(entropies_N[top_N].sum(dtype=np.float64)) / total if total else 0.0,
        },
        "least_count": least_count,
        "forking": sorted(table, key=lambda token: (-token["mean"], token["id"]))[:listed],
        "steady": sorted(table, key=lambda token: (token["mean"], token["id"]))[:listed],
    }


def compared(entropies_N: np.ndarray, base_N: np.ndarray, *, ratio: float = 0.2, bins: int = 20) -> dict[str, Any]:
    """What training changed: a model's entropies beside its base's, token by token of one text.

    {"tokens", "mean", "near_zero", "percentiles": of the base,
     "overlap": {"ratio", "tokens", "shared", "share"}: positions that are among the top `ratio` of both,
     "change": [{"from", "to": percentiles of base entropy, "tokens", "base_mean", "mean_change"}]}
    "change" cuts the tokens into `bins` (≥ 1) of equal number by base entropy; a bin without tokens is left out.
    """
    top_N = top_share(base_N, ratio)
    shared = int((top_N & top_share(entropies_N, ratio)).sum())
    order = np.argsort(base_N, kind="stable")
    change_N = entropies_N.astype(np.float64) - base_N
    rows = []
    for b in range(bins):
        members = order[b * len(order) // bins : (b + 1) * len(order) // bins]
        if len(members):
            rows.append(
                {
                    "from": 100 * b / bins,
                    "to": 100 * (b + 1) / bins,
                    "tokens": len(members),
                    "base_mean": float(base_N[members].mean(dtype=np.float64)),
                    "mean_change": float(change_N[members].mean()),
                }
            )
    count = int(top_N.sum())
    overlap = {"ratio": ratio, "tokens": count, "shared": shared, "share": shared / count}
    return {**_spread(base_N), "overlap": overlap, "change": rows}


def percentile(ordered_N: np.ndarray, p: int) -> float:
    """The p-th percentile (0 < p ≤ 100) of ascending values: the ⌈p·N/100⌉-th of them."""
    return float(ordered_N[-(-p * len(ordered_N) // 100) - 1])


def _spread(entropies_N: np.ndarray) -> dict[str, Any]:
    ordered_N = np.sort(entropies_N)
    return {
        "tokens": len(ordered_N),
        "mean": float(entropies_N.mean(dtype=np.float64)),
        "near_zero": float((entropies_N.astype(np.float64) < NEAR_ZERO).mean()),
        "percentiles": {str(p): percentile(ordered_N, p) for p in PERCENTILES},
    }


def _by_token(tokens_N: np.ndarray, entropies_N: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(token ids ascending, their mean entropy, their count)."""
    ids, place_N, counts = np.unique(tokens_N, return_inverse=True, return_counts=True)
    return ids, np.bincount(place_N, weights=entropies_N, minlength=len(ids)) / counts, counts
