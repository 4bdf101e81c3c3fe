"""Whole runs on four ranks, TP 2 x PP 2: what they leave, resuming, stopping, the debug halves, conversion."""

import gzip
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dapo_megatron.data.group_files import load_groups
from dapo_megatron.launch import World, world_from_environment
from tests.command_line import RECIPE, ROOT, SMALL, command, environment, run_command
from tests.tiny_models import load_critic, load_model, write_model

pytestmark = pytest.mark.distributed

CONTRACT = {
    "step", "accuracy/train", "reward/mean", "entropy/mean", "probability/mean", "response_length/mean",
    "clip_fraction/low", "clip_fraction/high", "clip_fraction/dual", "groups/all_right", "groups/all_wrong",
    "truncated_fraction", "loss/policy", "grad_norm", "mismatch/logprob_abs_mean", "time/rollout", "time/learn",
    "time/reshard", "time/step", "tokens/trained", "packing/efficiency",
}  # fmt: skip


def metrics_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_times(metrics: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in metrics]


def ranks_of(marker: str) -> list[int]:
    """Processes whose command line holds `marker`."""
    found = subprocess.run(["pgrep", "-f", marker], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


# a random model answers nothing right; rewards by chance would leave nothing to learn, so any digit counts a little
LEARNABLE = ("reward.overlong.max_length=12", "reward.overlong.cache_length=11")


# more groups than a step trains on: some are kept for the next one
SURPLUS = (
    "algorithm.dynamic_sampling={enabled: true, metric: reward_std, max_waves: 2, over_sampling: 2, adaptive: false}",
    "algorithm.importance_bound=2.0",
    "algorithm.kl={coefficient: 0.1, place: loss, estimator: k2}",
    "algorithm.reference={kind: ema, decay: 0.9}",
)


# a second learner beside the policy, cut otherwise
CRITIC = (
    "algorithm.advantage=gae",
    "algorithm.whiten=true",
    "critic={learning_rate: 1.0e-3, epochs: 2, parallel: {tensor: 1, pipeline: 1}}",
)
# checkpoints are taken while both optimizers' states are in host memory
AWAY = ("learner.offload_optimizer=true",)
LOOKED_AT = ("run.stragglers_every=2", "profile={steps: [3], ranks: [1]}")
WHOLE = (*SMALL, *LEARNABLE, *SURPLUS, *CRITIC, *AWAY)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = tmp_path_factory.mktemp("finished") / "run"
    result = run_command("train", RECIPE, f"run.directory={run}", *WHOLE, "checkpoint.every=2", *LOOKED_AT)
    assert result.returncode == 0, result.stdout + result.stderr
    return run, result.stdout


def killed_after_step_2(whole: Path, run: Path) -> None:
    """A copy of a finished run as it would be, had it been killed while it saved and told of step 4."""
    shutil.copytree(whole, run)
    for model in ("hf", "critic"):
        shutil.rmtree(run / model)
    (run / "checkpoints" / "step-000004").rename(run / "checkpoints" / ".step-000004.tmp")
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(lines[: lines.rindex('{"step": 4') + 20])


def test_a_run_leaves_what_it_promises(finished):
    run, output = finished
    for name in ("config.yaml", "metrics.jsonl", "report.html", "report.png", "hf/model.safetensors", "samples.jsonl"):
        assert (run / name).is_file(), name
    # the last two, and the best: a random model's first validation is not surpassed
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*")) == ["step-000000", "step-000002", "step-000004"]
    assert json.loads((run / "checkpoints" / "best.json").read_text()) == {"step": 0, "folder": "step-000000"}
    lines = metrics_of(run)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    assert all("validation/accuracy" in lines[i] for i in (0, 2, 4))
    trained = [line for line in lines[1:] if line["tokens/trained"] > 0]
    assert trained, "nothing was trained"
    assert all(set(line) >= CONTRACT for line in trained if line["groups/generated"])
    assert all(line["mismatch/logprob_abs_mean"] < 1e-5 for line in trained)
    # the first step is drawn by the reference itself
    assert trained[0]["kl/mean"] == trained[0]["kl/k2"] == 0.0
    assert all(line["kl/mean"] > 0 and line["kl/k2"] > 0 and line["kl/loss"] > 0 for line in trained[1:])
    assert all(line["reference/moved"] > 0 for line in trained)
    assert (run / "checkpoints" / "step-000002" / "reference").is_dir() and not (run / "reference").exists()
    assert "report.png" in output and "before:" in output and "after:" in output
    assert len(re.findall(r"^step +\d", output, re.M)) == 5


def test_ranks_are_compared_and_chosen_steps_traced(finished):
    run, _ = finished
    metrics = metrics_of(run)
    assert [line["step"] for line in metrics if "time/ranks/work/ratio" in line] == [2, 4]
    phases = {"rollout", "forward_backward", "optimizer", "reshard", "checkpoint", "probe", "waiting", "work"}
    assert {key.split("/")[2] for key in metrics[4] if key.startswith("time/ranks/")} == phases
    assert all(metrics[4][f"time/ranks/{phase}/max"] > 0 for phase in phases)
    (trace,) = (run / "profile").iterdir()
    assert trace.name == "step-000003-rank-00001.json.gz"
    with gzip.open(trace) as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"rollout", "learn", "forward_backward", "optimizer", "reshard"} <= names


def test_the_exported_model_is_the_trained_one(finished):
    run, _ = finished
    before, after = load_file(run / "model" / "model.safetensors"), load_file(run / "hf" / "model.safetensors")
    assert set(before) == set(after)
    assert all(not torch.equal(before[name], after[name]) for name in before if name.endswith("proj.weight"))
    assert load_model(run / "hf")(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_the_exported_critic_is_a_token_classifier_that_learnt(finished):
    run, _ = finished
    critic = load_critic(run / "critic")
    assert critic.config.num_labels == 1 and critic(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, 1)
    assert critic.score.weight.abs().sum() > 0 and critic.score.bias.abs() > 0, "both begin as 0"
    steps = [line for line in metrics_of(run)[1:] if line["tokens/trained"] > 0]
    assert all(line["critic/updates"] == 2 * line["updates"] for line in steps)
    assert steps[0]["critic/value_mean"] == steps[0]["critic/explained_variance"] == 0.0
    assert steps[-1]["critic/value_mean"] != 0.0 and steps[-1]["critic/loss"] < steps[0]["critic/loss"]


def test_resuming_is_exact(finished, tmp_path):
    whole, _ = finished
    run = tmp_path / "run"
    killed_after_step_2(whole, run)
    lines = metrics_of(whole)
    reused = next(line for line in lines if line["step"] == 3)
    assert reused["groups/reused"] > 0, "the checkpoint must carry groups for this test to mean something"
    assert (run / "checkpoints" / "step-000002" / "surplus.safetensors").is_file()
    result = run_command("train", RECIPE, f"run.directory={run}", *WHOLE, "checkpoint.every=2", "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"resumed from {run / 'checkpoints' / 'step-000002'}" in result.stdout
    assert without_times(metrics_of(run)) == without_times(metrics_of(whole))
    assert (run / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert not list((run / "checkpoints").glob(".*"))
    for model in ("hf", "critic"):
        resumed, expected = (load_file(path / model / "model.safetensors") for path in (run, whole))
        assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_resuming_under_another_layout_is_close(finished, tmp_path):
    whole, _ = finished
    run = tmp_path / "run"
    killed_after_step_2(whole, run)
    result = run_command(
        "train", RECIPE, f"run.directory={run}", *WHOLE, "--resume", "parallel.tensor=1", "parallel.pipeline=1",
        "checkpoint.hugging_face=false",
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "of another layout" in result.stdout and "step-000002" in result.stdout
    found, expected = without_times(metrics_of(run)), without_times(metrics_of(whole))
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    assert found[:3] == expected[:3], "steps before the checkpoint are not made again"
    for line, wanted in zip(found[3:], expected[3:], strict=True):
        assert set(line) == set(wanted)
        keys = {"loss/policy", "grad_norm", "entropy/mean", "reward/mean", "tokens/trained", "critic/loss", "kl/loss"}
        for key in {*keys, "critic/grad_norm", "critic/explained_variance"} & set(wanted):
            assert line[key] == pytest.approx(wanted[key], rel=1e-3, abs=1e-5), (line["step"], key)


@pytest.mark.slow
def test_a_damaged_checkpoint_is_passed_over(finished, tmp_path):
    run = tmp_path / "run"
    shared = ("train", RECIPE, f"run.directory={run}", *SMALL, *LEARNABLE, *CRITIC, "run.steps=2", "checkpoint.every=1")
    assert run_command(*shared).returncode == 0
    newest = run / "checkpoints" / "step-000002"
    shard = max((newest / "critic").iterdir(), key=lambda p: p.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    result = run_command(*shared, "--resume")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "skipped a damaged checkpoint" in result.stdout and "resumed from" in result.stdout
    assert "step-000001" in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_and_no_process(tmp_path, number):
    run = tmp_path / "run"
    arguments = ("train", RECIPE, f"run.directory={run}", *SMALL, "run.steps=1000", "evaluation.every=0")
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not ((run / "metrics.jsonl").exists() and len(metrics_of(run)) >= 3):
            time.sleep(0.2)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "stopped at step" in output and "--resume" in output
    assert "Traceback" not in output
    assert ranks_of(str(run)) == []
    assert list((run / "checkpoints").glob("step-*/manifest.json"))


@pytest.mark.slow
def test_ranks_do_not_outlive_a_killed_launcher(tmp_path):
    run = tmp_path / "run"
    arguments = ("train", RECIPE, f"run.directory={run}", *SMALL, "run.steps=1000")
    process = subprocess.Popen(
        command(*arguments), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(ranks_of(str(run))) < 5:
        time.sleep(0.1)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and ranks_of(str(run)):
        time.sleep(0.1)
    assert ranks_of(str(run)) == []


@pytest.mark.slow
def test_the_debug_halves_make_the_whole(finished, tmp_path):
    """Rollouts of the first step saved, then learned from: the same update as in the whole run."""
    whole, _ = finished
    saved, learned = tmp_path / "saved", tmp_path / "learned"
    shared = (*WHOLE, "run.steps=1", "checkpoint.hugging_face=false", "evaluation.every=0")
    result = run_command("train", RECIPE, f"run.directory={saved}", *shared, "--debug-rollout-only")
    assert result.returncode == 0, result.stderr
    assert "tokens/trained" not in metrics_of(saved)[-1] and not (saved / "hf").exists()
    files = list((saved / "debug").glob("rollout-*.safetensors"))
    assert len(files) == 1
    start = run_command("train", RECIPE, f"run.directory={learned}", *shared, "run.steps=0")
    assert start.returncode == 0, start.stderr
    result = run_command(
        "train", RECIPE, f"run.directory={learned}", *shared, "--resume", "--debug-train-only", files[0]
    )
    assert result.returncode == 0, result.stdout + result.stderr
    step, expected = metrics_of(learned)[-1], metrics_of(whole)[1]
    for key in ("loss/policy", "grad_norm", "entropy/mean", "probability/mean", "tokens/trained", "critic/loss"):
        assert step[key] == expected[key], key
    rewards = [group.rewards for group in load_groups(files[0])]
    assert step["reward/mean"] == pytest.approx(np.concatenate(rewards).mean())


def test_weights_that_never_reach_the_engine_are_noticed(tmp_path):
    run = tmp_path / "run"
    result = run_command(
        "train", RECIPE, f"run.directory={run}", *SMALL, *LEARNABLE, "resharding.enabled=false",
        "resharding.max_logprob_gap=0.02", "optimizer.learning_rate=0.01",
    )  # fmt: skip
    assert result.returncode == 1, result.stdout
    assert "mismatch alarm" in result.stderr and "resharding.enabled=false" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_under_torchrun_it_joins_the_world_it_finds(tmp_path):
    run = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = command("train", RECIPE, f"run.directory={run}", *SMALL, "parallel.pipeline=1", "run.steps=1")[1:]
    result = subprocess.run(
        [*torchrun, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert metrics_of(run)[-1]["step"] == 1
    again = subprocess.run(
        [*torchrun, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240
    )
    assert again.returncode != 0
    assert again.stderr.count("already holds a run") == 1


def test_srun_variables_name_the_place_in_the_world():
    srun = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "11", "SLURM_LOCALID": "3"}
    assert world_from_environment(srun) == World(rank=11, size=16, local_rank=3)
    shell = {**srun, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "16"}
    assert world_from_environment(shell) is None, "salloc's shell is no world"
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    assert world_from_environment({**srun, **torchrun}) == World(rank=1, size=2, local_rank=1)
    assert world_from_environment({}) is None


@pytest.mark.parametrize("family, tied, dtype", [("qwen2", False, torch.bfloat16), ("qwen3", True, torch.float32)])
def test_convert_there_and_back_is_bit_equal(tmp_path, family, tied, dtype):
    source = write_model(tmp_path / "source", family, tied=tied, dtype=dtype)
    there = run_command(
        "convert", "hf-to-megatron", source, tmp_path / "megatron", "parallel.tensor=2", "parallel.pipeline=2"
    )
    assert there.returncode == 0, there.stderr
    back = run_command("convert", "megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
    assert back.returncode == 0, back.stderr
    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype and torch.equal(after[name], tensor), name
    tokens = torch.tensor([[3, 14, 15, 9, 2, 6]])
    logits = load_model(tmp_path / "back", dtype)(tokens).logits
    assert torch.equal(logits, load_model(source, dtype)(tokens).logits)
