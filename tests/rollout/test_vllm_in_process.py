"""vLLM in one process with triton and megatron, under torchrun's variables: the in-process engine on all counts."""

import json
import os
import subprocess
import sys

import pytest

from tests.ranks import ROOT
from tests.rollout.served import write_models

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in-process")
    out = folder / "found.json"
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.rollout.in_process_cases", *map(str, write_models(folder)), str(out)],
        cwd=ROOT,
        env={**os.environ, **world, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    return json.loads(out.read_text())


def test_triton_megatron_and_a_world_do_not_disturb_vllm(found):
    assert found["triton"] == "3.7.1"
    assert found["before weights"] == "rollout: the engine has no weights yet"


def test_output_is_that_of_transformers_for_one_set_of_weights_after_the_other(found):
    assert found["greedy"] == [16, 16]
    assert max(found["gaps"]) <= 2e-5


def test_weights_change_at_exactly_the_token_at_which_they_were_replaced(found):
    assert found["boundary"] == [[7, True, True]] * 16


def test_a_paused_engine_says_so_and_an_aborted_request_returns_what_it_has(found):
    told, reasons, aborted, rest = found["paused"]
    assert "2 requests unfinished: the engine is paused" in told
    assert (reasons, aborted, rest) == (["abort"], [1], [10])


def test_a_weight_that_was_packed_or_renamed_is_named(found):
    key = "model.layers.2.mlp.down_proj.weight"
    assert f"place 1: vLLM holds {key} as (0,), the layout has (128, 96)" in found["packed"]["packed"]
    renamed = "model.layers.2.mlp.down_proj.packed_weight"
    assert f"vLLM holds {renamed} as (128, 96), the layout has nothing" in found["packed"]["renamed"]
