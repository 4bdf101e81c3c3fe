"""The generative verifier from end to end on the multi-subject file: collect in training, distil, calibrate."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from dapo_megatron.rewards.judge_prompt import PROMPT
from tests.command_line import ROOT, environment, run_command
from tests.rewards.judges import chat_answer, first_token, serving, write_tokenizer

FILE = Path(__file__).parents[2] / "shared" / "data" / "multi-subject-rlvr.jsonl"
REFERENCES = ("1", "2", "3", "15")
FORMS = ("{}", "it is {}")  # the second form is right to a judge, and to the rule it is not
SIZES = "hidden: 64, layers: 2, heads: 4, kv_heads: 2, head_dim: 16, ffn: 128, tied: true"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FILE.exists(), reason="needs the real data")]


def teacher(prompt: str) -> bytes:
    """YES at 0.9 where the answer ends with the reference, else at 0.1."""
    answer, reference = (
        json.loads(re.search(rf"^{place} answer: (.*)$", prompt, re.M)[1]) for place in ("Final", "Reference")
    )
    return chat_answer(first_token(0.9 if answer.split()[-1] == reference else 0.1))


def run_tool(name: str, *arguments: object) -> str:
    command = [sys.executable, ROOT / "tools" / f"{name}.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train(recipe: str, *overrides: object) -> None:
    arguments = (ROOT / "recipes" / "methods" / f"{recipe}.yaml", "monitoring.tensorboard=false", *overrides)
    done = run_command("train", *arguments, time_limit_s=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_collect_distil_calibrate(tmp_path: Path):
    every = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    rows = [
        row | {"subject": "numbers" if i % 3 else "others"}
        for i, row in enumerate(every)
        if row["ground_truth"] in REFERENCES
    ]
    rng = random.Random(0)
    warm = [row | {"ground_truth": rng.choice(FORMS).format(rng.choice(REFERENCES))} for row in rows for _ in range(8)]
    for name, lines in (("questions", rows), ("warm", warm)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_tokenizer(tmp_path / "tokenizer", [PROMPT, *[row["messages"] for row in rows]] * 3, 1200)
    scratch = f"model.scratch={{tokenizer: {tmp_path / 'tokenizer'}, {SIZES}}}"
    stage = (
        f"supervised.stages=[{{data: {tmp_path / 'warm.jsonl'}, prompt_column: messages, "
        "response_column: ground_truth, response_template: 'Answer: {response}', steps: 40, batch_sequences: 16, "
        "learning_rate: 1.0e-2}]"
    )
    collected = tmp_path / "collected.parquet"
    run = (
        f"run.directory={tmp_path / 'rl'}", f"data.train={tmp_path / 'questions.jsonl'}", scratch, stage,
        f"reward.judge.collect={collected}", "reward.judge.rule_first=false",
    )  # fmt: skip
    with serving(teacher) as (url, requests):
        train("judge", *run, f"reward.judge.url={url}")
    lines = [json.loads(line) for line in (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()][1:]
    assert len(lines) == 2 and all(line["judge/judged"] == line["responses/generated"] for line in lines)
    assert all(line["judge/fallbacks"] == 0 and line["tokens/trained"] > 0 for line in lines)
    found = pyarrow.parquet.read_table(collected).to_pylist()
    assert len(found) == len({(row["question"], row["answer"], row["reference"]) for row in found})
    assert len(found) <= len(requests) and {row["verdict"] for row in found} == {"YES", "NO"}
    assert {row["question"] for row in found} <= {
        " ".join(json.loads(r["messages"])[1]["content"].split()) for r in rows
    }
    assert any(row["verdict"] == "YES" and row["answer"] != row["reference"] for row in found), "the rule misses some"

    examples, held = tmp_path / "train.jsonl", tmp_path / "held.parquet"
    told = run_tool(
        "judge_data", collected, "-o", examples, "--held-out", held, "--held-out-share", 0.2, "--targets", "soft"
    )
    print(told)
    stage = (
        f"supervised.stages=[{{data: {examples}, weight_column: weight, steps: 120, batch_sequences: 32, "
        "learning_rate: 3.0e-3, schedule: cosine, warmup_steps: 10}]"
    )
    train("judge-distil", f"run.directory={tmp_path / 'distil'}", scratch, stage, "data.chat_template=true")
    told = run_tool(
        "judge_calibration", held, "--judge", f"student={tmp_path / 'distil' / 'hf'}", "-o", tmp_path / "report",
        "--subjects", tmp_path / "questions.jsonl", "--prompt-column", "messages", "--subject-column", "subject",
    )  # fmt: skip
    print(told)
    report = json.loads((tmp_path / "report" / "calibration.json").read_text())
    student = report["judges"]["student"]
    assert student["without_verdict"] == 0 and set(student["by_subject"]) == {"numbers", "others"}
    assert 0 < report["rule"]["accuracy"] < 1
