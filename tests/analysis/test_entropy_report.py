"""Entropy reports against slow definitions: sorted lists, sets of positions, one token at a time."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.analysis.entropy_figure import draw_entropy
from dapo_megatron.analysis.entropy_report import PERCENTILES, compared, entropy_report


@st.composite
def entropies(draw, count=None):
    """Few distinct values now and then, so that ties occur."""
    count = count or draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    values = rng.choice([0.0, 0.009, 0.01, 1.0, 2.0], count) if draw(st.booleans()) else rng.exponential(1, count)
    return values.astype(np.float32)


def top(values, ratio):
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    return set(order[: max(1, math.floor(round(ratio * len(values), 9)))])


@settings(max_examples=60, deadline=None)
@given(entropies_N=entropies(), ratio=st.sampled_from([0.05, 0.2, 0.5, 1.0]), least=st.integers(1, 4))
def test_a_report_is_what_sorting_and_counting_say(entropies_N, ratio, least):
    tokens_N = np.random.default_rng(len(entropies_N)).integers(0, 9, len(entropies_N))
    found = entropy_report(tokens_N, entropies_N, lambda token: f"t{token}", ratio=ratio, least_count=least, listed=3)
    values = [float(value) for value in entropies_N]
    for p in PERCENTILES:
        quantile = found["percentiles"][str(p)]
        assert quantile in values
        assert 100 * sum(v <= quantile for v in values) >= p * len(values) > 100 * sum(v < quantile for v in values)
    assert found["near_zero"] == pytest.approx(sum(v < 0.01 for v in values) / len(values))
    assert found["mean"] == pytest.approx(sum(values) / len(values))
    chosen = top(values, ratio)
    assert found["top"]["tokens"] == len(chosen)
    assert found["top"]["least_entropy"] == min(values[i] for i in chosen)
    if sum(values):
        assert found["top"]["share_of_entropy"] == pytest.approx(sum(values[i] for i in chosen) / sum(values))
    of_token = {t: [v for v, own in zip(values, tokens_N, strict=True) if own == t] for t in set(tokens_N.tolist())}
    table = [(t, sum(own) / len(own), len(own)) for t, own in sorted(of_token.items()) if len(own) >= least]
    for key, sign in (("forking", -1), ("steady", 1)):
        expected = sorted(table, key=lambda row: (sign * round(row[1], 9), row[0]))[:3]
        assert [t["mean"] for t in found[key]] == pytest.approx([row[1] for row in expected])
        assert [t["text"] for t in found[key]] == [f"t{t['id']}" for t in found[key]]
        assert all(t["count"] == len(of_token[t["id"]]) for t in found[key])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(1, 60), ratio=st.sampled_from([0.2, 0.5, 1.0]), bins=st.integers(1, 25))
def test_overlap_and_change_are_counted_position_by_position(data, count, ratio, bins):
    ours, base = data.draw(entropies(count)), data.draw(entropies(count))
    found = compared(ours, base, ratio=ratio, bins=bins)
    both = top(ours, ratio) & top(base, ratio)
    assert found["overlap"]["shared"] == len(both)
    assert found["overlap"]["share"] == pytest.approx(len(both) / len(top(base, ratio)))
    order = sorted(range(count), key=lambda i: (base[i], i))
    rows = found["change"]
    assert sum(row["tokens"] for row in rows) == count
    for row in rows:
        first, last = round(row["from"] / 100 * bins), round(row["to"] / 100 * bins)
        members = order[first * count // bins : last * count // bins]
        assert last == first + 1 and row["tokens"] == len(members) > 0
        assert row["mean_change"] == pytest.approx(np.mean([float(ours[i]) - float(base[i]) for i in members]))
        assert row["base_mean"] == pytest.approx(np.mean([float(base[i]) for i in members]))
    assert found["mean"] == pytest.approx(float(base.mean()), rel=1e-5)


def test_the_picture_takes_tokens_as_text(tmp_path):
    """What matplotlib would read as a formula, and fail on, is a label like any other."""
    rng = np.random.default_rng(0)
    texts = {0: "$\\frac{", 1: "\n\x1b[2J", 2: "数" * 40}
    entropies_N = rng.exponential(1, 30).astype(np.float32)
    report = entropy_report(np.arange(30) % 3, entropies_N, texts.get)
    draw_entropy(report, tmp_path / "alone.png")
    report["base"] = compared(entropies_N, rng.exponential(1, 30).astype(np.float32))
    draw_entropy(json.loads(json.dumps(report)), tmp_path / "both.png")
    for name in ("alone", "both"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
