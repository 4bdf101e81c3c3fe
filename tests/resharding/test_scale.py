"""Qwen2.5-32B from 128 learner ranks to 128 workers, planned on one core."""

import json
import subprocess
import sys

import pytest

from tests.ranks import ROOT

MOST_BYTES = 1_000_000_000


@pytest.fixture(scope="module", params=[8, 4])
def scale(request: pytest.FixtureRequest) -> tuple[int, dict]:
    command = [sys.executable, "-m", "tests.resharding.qwen32b", str(request.param)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return request.param, json.loads(done.stdout)


def test_exact_cover_in_bounded_memory(scale):
    tensor, found = scale
    print(f"TP8 x PP4 x DP4 -> {128 // tensor} x TP{tensor}: {found['seconds']:.2f} s, {found['peak_bytes']:,} bytes")
    assert not found["torch"]  # its memory would hide the plan's
    assert found["peak_bytes"] < MOST_BYTES
    assert found["received"] == found["wanted"] and len(found["wanted"]) == 128
    # 65.53 GB in bf16 an engine, and its replicated norms once a worker
    norms = (2 * 64 + 1) * 5120
    a_copy = 152064 * 5120 * 2 + 64 * ((5120 + 2 * 1024) * 5121 + 5120 * 5120 + 3 * 27648 * 5120)
    assert sum(found["received"].values()) == 128 // tensor * (a_copy + tensor * norms)


def test_the_messages_of_the_scale(scale):
    tensor, found = scale
    if tensor == 8:
        # a layer: qkv weight, qkv bias, o, gate_up, down, two norms; and embedding, last norm, output layer
        assert found["moves_of_a_worker"] == [64 * 7 + 3]
        assert found["packed_elements"] == 0
        # of these the two norms and the bias are small
        assert found["messages"]["direct"] == 128 * (64 * 4 + 2)
    else:
        # 6 of qkv, twice; 2 each of o and down; 4 of gate_up; two norms; and 2 each of embedding and output layer
        assert found["moves_of_a_worker"] == [64 * (6 + 6 + 2 + 2 + 4 + 2) + 5]
        assert found["packed_elements"] == 32 * (64 * (5120 * 5120 + 5120 * 27648))
    assert found["messages"]["bucket"] < found["moves"]


def test_ranks_of_a_stage_send_alike(scale):
    _, found = scale
    largest = 152064 // 8 * 5120
    for stage in range(4):
        sent = [found["sent"][str(rank)] for rank in range(32 * stage, 32 * stage + 32)]
        assert max(sent) - min(sent) <= largest
