"""Runs of both rollout shapes on one rank with the embedded engine; a killed one goes on with the trees it kept."""

import json
from pathlib import Path

import numpy as np
import pytest

from dapo_megatron.data.group_files import load_groups
from tests.ranks import run_ranks

pytestmark = pytest.mark.distributed

SEGMENTS = {"segments/valued", "segments/dropped", "segments/repeated_tokens", "segments/continuations"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    run_ranks(1, "tests.shape_cases:runs", {"folder": str(folder)})
    return folder


def metrics_of(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines if line["step"]]


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_a_run_learns_from_segments_and_tells_what_they_cost(folder, shape):
    lines = metrics_of(folder / shape)
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert set(line) >= SEGMENTS | {"tokens/generated_per_trained"}
        assert line["grad_norm"] > 0 and line["mismatch/logprob_abs_mean"] < 1e-5
        assert line["segments/valued"] > 8 and 0 <= line["segments/dropped"] < 1
        ratio = line["tokens/generated"] / line["tokens/trained"]
        assert line["tokens/generated_per_trained"] == pytest.approx(ratio)
    assert all(line["segments/continuations"] > 0 for line in lines) == (shape == "chain")
    assert all(line["segments/repeated_tokens"] > 0 for line in lines) == (shape == "tree")


def test_kept_trees_are_trained_on_after_a_resume_to_the_bit(folder):
    whole, resumed = metrics_of(folder / "tree"), metrics_of(folder / "resumed")
    assert whole[1]["groups/reused"] > 0, "the checkpoint must carry trees for this test to mean something"
    assert resumed == whole
    kept = load_groups(folder / "resumed" / "checkpoints" / "step-000001" / "surplus.safetensors")
    assert kept and all(g.counts is not None for g in kept)
    for group in kept:
        for completion, advantages, weights in zip(group.completions, group.advantages, group.weights, strict=True):
            assert len(completion.tokens) == len(advantages) == len(weights)
            assert np.array_equal(weights > 0, (advantages != 0) & (weights > 0)) and set(weights) <= {0.0, 1.0}
