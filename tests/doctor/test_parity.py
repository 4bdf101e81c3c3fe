"""Verdicts of `doctor --parity`: a sound stack passes, a wrong part fails, a part that hangs fails and ends."""

import json
import math
import os
import sys
import time
from dataclasses import replace

import pytest
import torch
from dapo_kernels import clipped_policy_loss

from dapo_megatron.config.load import load_recipe
from dapo_megatron.doctor import parity
from dapo_megatron.doctor.parity_kernels import kernel_gap
from dapo_megatron.doctor.parity_learner import mean_gap
from dapo_megatron.doctor.parity_model import Trial, read_trial, trial_of, write_trial
from dapo_megatron.doctor.verdict import FAILED, PASSED, SKIPPED, verdict_of
from dapo_megatron.rollout.vllm_plugin import vllm_version
from tests.command_line import RECIPE, ROOT, run_command
from tests.ranks import run_ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("told", "needed", "outcome"),
    [
        ({"number": 1.0, "bound": 1.0, "text": "t"}, None, PASSED),
        ({"number": 1.001, "bound": 1.0, "text": "t"}, None, FAILED),
        ({"number": math.nan, "bound": 1.0, "text": "t"}, None, FAILED),
        ({"number": math.inf, "bound": 1.0, "text": "t"}, None, FAILED),
        ({"skipped": "no GPU"}, None, SKIPPED),
        ({"skipped": "no GPU"}, "model.layer_spec=transformer_engine", FAILED),
        (None, None, FAILED),
    ],
)
def test_the_verdict_on_what_a_part_told(told, needed, outcome):
    found = verdict_of("part", told, "it hung", seconds=1.0, needed=needed)
    assert found.outcome == outcome
    assert (needed or "") in found.text
    assert told is not None or found.text == "it hung"


def test_a_wrong_kernel_shows_in_every_result():
    def sound(logits, **settings):
        return clipped_policy_loss(logits, **{**settings, "implementation": "torch"})

    def other_clip(logits, **settings):
        return sound(logits, **{**settings, "eps_high": settings["eps_high"] + 0.01})

    def no_temperature(logits, **settings):
        return sound(logits, **{**settings, "temperature": 1.0})

    def lost_digits(logits, **settings):
        return sound((logits * 256).round() / 256, **settings)

    trial = Trial(temperature=0.9)
    assert kernel_gap(sound, trial, CPU, rows=24, vocabulary=193) <= 1
    for wrong in (other_clip, no_temperature, lost_digits):
        assert kernel_gap(wrong, trial, CPU, rows=24, vocabulary=193) > 1, wrong.__name__


def test_a_nan_of_a_kernel_is_no_agreement():
    def broken(logits, **settings):
        result = clipped_policy_loss(logits, **{**settings, "implementation": "torch"})
        return replace(result, logprobs=result.logprobs * math.nan)

    assert kernel_gap(broken, Trial(), CPU, rows=24, vocabulary=193) == math.inf
    assert mean_gap([torch.zeros(2).numpy()], [torch.tensor([0.0, math.nan]).numpy()]) != 0


def test_a_part_that_hangs_or_dies_has_failed_and_is_gone(tmp_path, monkeypatch):
    sleeper = "import subprocess, time; print(subprocess.Popen(['sleep', '50']).pid, flush=True); time.sleep(50)"
    monkeypatch.setattr(parity, "part_command", lambda *_: [sys.executable, "-c", sleeper])
    hung = parity.run_part("kernels", tmp_path, Trial(), time_limit_s=3)
    assert hung.outcome == FAILED and "not done within 3 s" in hung.text
    child = int((tmp_path / "kernels.log").read_text())
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{child}") and _state(child) != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{child}") or _state(child) == "Z"
    monkeypatch.setattr(parity, "part_command", lambda *_: [sys.executable, "-c", "raise ValueError('a cause')"])
    died = parity.run_part("layers", tmp_path, Trial(), time_limit_s=60)
    assert died.outcome == FAILED and "code 1" in died.text and "a cause" in died.text


def _state(process: int) -> str:
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(") ")[2][0]


def test_the_trial_follows_the_recipe(tmp_path):
    recipe = load_recipe(RECIPE, ["rollout.engine=vllm", "rollout.temperature=0.8", "learner.device=cpu"])
    trial = trial_of(recipe)
    assert (trial.family, trial.temperature, trial.needed) == ("qwen2", 0.8, {"engine": "rollout.engine=vllm"})
    write_trial(trial, tmp_path)
    assert read_trial(tmp_path) == trial


def test_a_published_model_need_not_be_on_this_machine():
    trial = trial_of(load_recipe(ROOT / "recipes" / "gpu" / "qwen2.5-7b-dapo.yaml"))
    assert (trial.family, trial.vocabulary) == ("qwen2", 152064)


def test_what_a_recipe_has_no_use_for_is_skipped(tmp_path):
    trial = trial_of(load_recipe(RECIPE))
    assert list(trial.idle) == ["engine"]
    found = parity.run_part("engine", tmp_path, trial, time_limit_s=1)  # a process would find no model there
    assert found.outcome == SKIPPED and "rollout.engine=hf" in found.text
    judge = ["reward.grader=judge", "reward.judge.model=models/judge", "reward.judge.engine=vllm"]
    for asked in (["rollout.engine=vllm"], judge):
        assert not trial_of(load_recipe(RECIPE, asked)).idle


@pytest.mark.distributed
def test_layers_agree_with_themselves_and_not_with_damaged_ones(tmp_path):
    write_trial(Trial(), tmp_path)
    (sound, bound), (damaged, _) = run_ranks(1, "tests.doctor.parity_cases:layers", {"folder": str(tmp_path)})
    assert sound == 1.0
    assert damaged > bound


@pytest.mark.slow
def test_parity_of_this_machine():
    asked = ["rollout.engine=vllm"] if vllm_version() else []
    done = run_command("doctor", "--parity", RECIPE, *asked, "--json", time_limit_s=800)
    told = json.loads(done.stdout.splitlines()[-1])
    found = {part["part"]: part for part in told["parts"]}
    assert list(found) == list(parity.PARTS)
    expected = dict.fromkeys(parity.PARTS, PASSED) | {"parameters": SKIPPED, "layers": SKIPPED}
    expected |= {} if asked else {"engine": SKIPPED}
    assert {name: part["outcome"] for name, part in found.items()} == expected, told
    assert (done.returncode, told["passed"], told["schema"]) == (0, True, 1)
    assert found["reshard"]["number"] == 0 and "slices of" in found["reshard"]["text"]
