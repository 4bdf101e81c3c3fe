"""Recipes of recipes/methods/ from prompt to metrics."""

import pytest

from dapo_megatron.monitoring.metrics import read_metrics
from tests.command_line import ROOT, run_command

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

OWN = """
from dapo_megatron.algorithms.registry import register_advantage

@register_advantage("{name}", "R minus the best")
def best(group):
    return group.rewards_G - group.rewards_G.max()
"""


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("kl-cov", ["algorithm.statistics=current", "algorithm.token_selection.kind=high-entropy"]),
        ("clip-cov", ["parallel.tensor=2"]),
    ],
)
def test_two_steps(name, overrides, tmp_path):
    own, run = tmp_path / "own.py", tmp_path / "run"
    own.write_text(OWN.format(name=f"best-{name}"))
    changes = [
        f"run.directory={run}", "run.steps=2", "evaluation.every=0", "checkpoint.hugging_face=false",
        f"algorithm.extensions=[{own}]", f"algorithm.advantage=best-{name}",
        "algorithm.dynamic_sampling.enabled=false", *overrides,
    ]  # fmt: skip
    result = run_command("train", str(ROOT / "recipes" / "methods" / f"{name}.yaml"), *changes, time_limit_s=400)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [row for row in read_metrics(run / "metrics.jsonl") if row["step"] > 0]
    assert len(rows) == 2
    for row in rows:
        if not row["tokens/trained"]:
            continue
        assert row["updates"] + row["updates/skipped"] == 4 and row["grad_norm"] > 0
        assert row["selection/seconds"] > 0
        if name == "kl-cov":
            assert 0.15 < row["selection/kept"] <= 0.2 and row["selection/penalised"] > 0
        else:
            assert 0.9 < row["selection/kept"] <= 1.0 and row["selection/penalised"] == 0
    assert any(row["tokens/trained"] for row in rows)


def test_a_critic_warms_up_alone_and_then_the_policy_moves(tmp_path):
    run = tmp_path / "run"
    changes = [
        f"run.directory={run}", "run.steps=2", "evaluation.every=0", "monitoring.report=false", "parallel.tensor=2",
        "critic.warmup_steps=1", "rollout.prompts_per_step=32", "algorithm.mini_batch_prompts=16",
        "supervised.stages=[{data: worked, steps: 10, batch_sequences: 16, learning_rate: 1.0e-3}]",
        "algorithm.kl={coefficient: 0.01, place: reward, estimator: k3}", "model.dtype=bf16",
        "resharding.max_logprob_gap=null",
    ]  # fmt: skip
    result = run_command("train", str(ROOT / "recipes" / "methods" / "ppo.yaml"), *changes, time_limit_s=400)
    assert result.returncode == 0, result.stdout + result.stderr
    first, second = (row for row in read_metrics(run / "metrics.jsonl") if row["step"] > 0)
    assert "loss/policy" not in first and "nothing trained" not in result.stdout
    assert first["critic/updates"] == second["critic/updates"] == 4 and second["updates"] == 2
    assert first["critic/value_mean"] == 0.0 and second["critic/value_mean"] != 0.0
    # bf16 weights in whole: the reference, swapped in, is the policy itself until that moves
    assert first["kl/mean"] == second["kl/mean"] == 0.0 and second["grad_norm"] > 0


def test_supervised_stages_alone_end_with_an_evaluation_and_a_folder(tmp_path):
    run = tmp_path / "run"
    stages = "supervised.stages=[{data: worked, steps: 30, batch_sequences: 16, learning_rate: 3.0e-3}]"
    recipe = str(ROOT / "recipes" / "methods" / "supervised.yaml")
    result = run_command("train", recipe, f"run.directory={run}", stages, "evaluation.samples=1", time_limit_s=400)
    assert result.returncode == 0, result.stdout + result.stderr
    (row,) = read_metrics(run / "metrics.jsonl")
    assert row["step"] == 0 and 0 <= row["validation/accuracy"] <= 1 and "tokens/trained" not in row
    losses = [step["loss/supervised"] for step in read_metrics(run / "supervised.jsonl")]
    assert len(losses) == 30 and losses[-1] < losses[0] / 2
    assert (run / "hf" / "model.safetensors").is_file() and (run / "report.html").is_file()


def test_pairs_of_a_file_and_a_resumed_run_agree_to_the_bit(tmp_path):
    changes = ["optimizer.schedule=constant", "evaluation.every=0", "checkpoint.every=1", "monitoring.report=false"]
    changes.append("supervised.stages=[{data: worked, steps: 8, batch_sequences: 16, learning_rate: 1.0e-3}]")

    def train(run, *more):
        recipe = str(ROOT / "recipes" / "methods" / "dpo.yaml")
        result = run_command("train", recipe, f"run.directory={run}", *changes, *more, time_limit_s=400)
        assert result.returncode == 0, result.stdout + result.stderr

    train(tmp_path / "whole", "run.steps=2")
    train(tmp_path / "parts", "run.steps=1")
    train(tmp_path / "parts", "run.steps=2", "--resume")
    whole, parts = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    assert [row["step"] for row in whole] == [0, 1, 2]
    for one, other in zip(whole, parts, strict=True):
        keys = {key for key in one if not key.startswith("time/")}
        assert {key: one[key] for key in keys} == {key: other[key] for key in keys}
    first, second = whole[1:]
    assert first["tokens/generated"] == first["responses/generated"] == 0 < first["response_length/mean"]
    assert not [key for key in first if key.startswith(("accuracy/", "reward/", "groups/all_"))]
    assert first["pairs/trained"] == 16 and first["mismatch/logprob_abs_max"] == 0
    # before its first update the policy is the reference
    assert first["pairs/margin"] == pytest.approx(0, abs=1e-3) and first["loss/pairs"] == pytest.approx(
        0.6931, abs=1e-3
    )
    assert second["pairs/margin"] > 0.01 and second["pairs/right"] > 0.6
