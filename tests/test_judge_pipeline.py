"""The generative verifier from end to end on the multi-subject file: collect in training, distil, calibrate."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from tests.command_line import ROOT, environment, run_command
from tests.rewards.judges import chat_answer, first_token, serving, write_tokenizer

FILE = Path(__file__).parents[2] / "shared" / "data" / "multi-subject-rlvr.jsonl"
REFERENCES = ("1", "2", "3", "15")
FORMS = ("{}", "it is {}")  # the second form is right to a judge, and to the rule it is not
WORDING = "Reference answer: {reference}\nFinal answer: {answer}\nReply:"  # short: the student learns in seconds
SIZES = "hidden: 64, layers: 2, heads: 4, kv_heads: 2, head_dim: 16, ffn: 128, tied: true, init_std: 0.08"

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FILE.exists(), reason="needs the real data")]


def teacher(prompt: str) -> bytes:
    """YES at 0.9 where the answer ends with the reference, else at 0.1."""
    reference, answer = (json.loads(text) for text in re.findall(r"^\w+ answer: (.*)$", prompt, re.MULTILINE))
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


def stage(data: Path, steps: int, rate: float, **more: object) -> str:
    settings = {"data": str(data), "steps": steps, "batch_sequences": 16, "learning_rate": rate, **more}
    return f"supervised.stages={json.dumps([settings])}"


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_collect_distil_calibrate(tmp_path: Path):
    every = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in every if row["ground_truth"] in REFERENCES]
    rows = [row | {"subject": ("odd", "even")[i % 2]} for i, row in enumerate(rows)]
    rng = random.Random(0)
    warm = [row | {"ground_truth": rng.choice(FORMS).format(rng.choice(REFERENCES))} for row in rows for _ in range(8)]
    questions, warm = write_rows(tmp_path / "questions.jsonl", rows), write_rows(tmp_path / "warm.jsonl", warm)
    write_tokenizer(tmp_path / "tokenizer", [WORDING, *[row["messages"] for row in rows]] * 3, 1200)
    scratch = f"model.scratch={{tokenizer: {tmp_path / 'tokenizer'}, {SIZES}}}"
    wording, collected = tmp_path / "wording.txt", tmp_path / "collected.parquet"
    wording.write_text(WORDING)

    columns = {"prompt_column": "messages", "response_column": "ground_truth"}
    warm_start = stage(warm, 70, 5e-3, response_template="Answer: {response}", **columns)
    with serving(teacher) as (url, requests):
        train(
            "judge", f"run.directory={tmp_path / 'rl'}", f"data.train={questions}", scratch, warm_start,
            "rollout.prompts_per_step=16", f"reward.judge.url={url}", f"reward.judge.collect={collected}",
            "reward.judge.rule_first=false", f"reward.judge.prompt={json.dumps(WORDING)}",
        )  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "rl" / "metrics.jsonl").read_text().splitlines()][1:]
    assert len(lines) == 2 and all(line["judge/judged"] == line["responses/generated"] for line in lines)
    assert all(line["judge/fallbacks"] == 0 and line["tokens/trained"] > 0 for line in lines)
    found = pyarrow.parquet.read_table(collected).to_pylist()
    assert len(found) == len({(row["question"], row["answer"], row["reference"]) for row in found}) <= len(requests)
    asked = {" ".join(json.loads(row["messages"])[1]["content"].split()) for row in rows}
    assert {row["question"] for row in found} <= asked, "the bare questions"
    assert {row["verdict"] for row in found} == {"YES", "NO"}
    assert any(row["verdict"] == "YES" and row["answer"] != row["reference"] for row in found), "the rule misses some"

    examples, held = tmp_path / "train.jsonl", tmp_path / "held.parquet"
    run_tool(
        "judge_data", collected, "-o", examples, "--held-out", held, "--held-out-share", 0.3, "--targets", "soft",
        "--prompt", wording, "--hostile",
    )  # fmt: skip
    soft = stage(examples, 250, 5e-3, weight_column="weight", schedule="cosine", warmup_steps=10)
    train("judge-distil", f"run.directory={tmp_path / 'distil'}", scratch, soft, "data.chat_template=true")

    student = tmp_path / "distil" / "hf"
    told = run_tool(
        "judge_calibration", held, "--judge", f"student={student}", "-o", tmp_path / "report", "--prompt", wording,
        "--subjects", questions, "--prompt-column", "messages", "--subject-column", "subject", "--hostile",
    )  # fmt: skip
    report = json.loads((tmp_path / "report" / "calibration.json").read_text())
    judged = report["judges"]["student"]
    assert judged["without_verdict"] == 0 and set(judged["by_subject"]) == {"odd", "even"}
    assert 0 < report["rule"]["accuracy"] < 1 and (tmp_path / "report" / "calibration.png").is_file()

    print(told)
    assert judged["quality"]["auc"] > 0.7 and judged["teacher"]["equal"] > 0.65
    # half of the hostile set was taught as NO, and few of the other half get through
    counts = report["hostile"]["student"]
    assert counts["others"]["cases"] == 42 and counts["without_verdict"] == 0
    assert counts["others"]["fooled"] <= 0.2 * counts["others"]["cases"]
