"""Every stage on the real DAPO-Math-17k with Qwen's tokenizer and a small new model: recipes/dapo-math-17k-cpu.yaml."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest

from tests.command_line import ROOT, run_command

DATA = Path(__file__).parents[2] / "shared" / "data"
FILES = ("dapo-math-17k.parquet", "aime24.parquet", "qwen2.5-tokenizer")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.distributed,
    pytest.mark.skipif(not all((DATA / name).exists() for name in FILES), reason="needs the real data"),
]


def write_answers(path: Path, rows: int) -> Path:
    """A warm start's file of the first questions, which makes answers such as 2 and 3 likely."""
    table = pyarrow.parquet.read_table(DATA / "dapo-math-17k.parquet").slice(0, rows).to_pylist()
    lines = [{"prompt": row["prompt"], "reward_model": {"ground_truth": str(i % 3 + 1)}} for i, row in enumerate(table)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_train_checkpoint_and_evaluate(tmp_path):
    run, output = tmp_path / "run", tmp_path / "problems.jsonl"
    answers = write_answers(tmp_path / "answers.jsonl", 64)
    stage = (
        f"supervised.stages=[{{data: {answers}, response_column: reward_model.ground_truth, "
        "response_template: 'Answer: {response}', steps: 30, batch_sequences: 8, learning_rate: 1.0e-2}]"
    )
    result = run_command(
        "train", ROOT / "recipes" / "dapo-math-17k-cpu.yaml", f"run.directory={run}", stage, "run.steps=1",
        f"data.train={DATA / FILES[0]}", f"data.validation={DATA / FILES[1]}",
        f"model.scratch.tokenizer={DATA / FILES[2]}", "parallel.pipeline=1", "rollout.prompts_per_step=16",
        "algorithm.mini_batch_prompts=8", "algorithm.dynamic_sampling.max_waves=3", "evaluation.every=0",
        "monitoring.tensorboard=false", time_limit_s=900,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert "12 questions have conflicting answers" in result.stdout
    assert "741 prompts dropped (24 for conflict, 717 for duplicate), 17176 kept" in result.stdout
    (line,) = (json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines() if '"step": 1' in text)
    assert line["groups/generated"] >= 16 and line["accuracy/train"] > 0
    assert line["groups/trained"] > 0 and line["tokens/trained"] > 0 and line["updates"] > 0
    assert line["mismatch/logprob_abs_mean"] < 1e-3

    newest = run / "checkpoints" / "step-000001"
    arguments = ("--model", newest, "--data", DATA / FILES[1], "--samples", 32, "--max-tokens", 6)
    result = run_command("evaluate", *arguments, "--json", "--output", output, time_limit_s=900)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["problems"], found["samples"]) == (30, 32)
    problems = [json.loads(text) for text in output.read_text().splitlines()]
    assert len(problems) == 30 and {len(p["responses"]) for p in problems} == {32}
    assert all(p["prompt"].startswith("Solve the following math problem step by step.") for p in problems)
    assert not any("boxed" in p["prompt"] for p in problems), "the file's own instruction is replaced"
    rights = [r["right"] for p in problems for r in p["responses"]]
    assert found["avg_at_k"] == pytest.approx(sum(rights) / 960)
