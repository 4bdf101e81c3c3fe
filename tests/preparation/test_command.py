import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from dapo_megatron.data.arithmetic import build_tokenizer
from dapo_megatron.data.prompts import read_prompts
from dapo_megatron.errors import RequestError
from dapo_megatron.preparation.command import Columns, Preparation, prepare_prompts
from dapo_megatron.preparation.output import describe_report
from tests.tiny_models import write_model

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
ROWS = [
    ("1+1=", "2"),
    ("2+2=", "4"),
    ("1+1= ", "\\frac{4}{2}"),
    ("2+2=", "5"),
    ("3+3=", "006"),
    ("1-2-3-4-5-6-7-8=", "-34"),
    ("5:2=", "2.5"),
    ("8+8=", "16"),
]


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps({"prompt": q, "answer": a}) + "\n" for q, a in rows))
    return path


@pytest.fixture
def request_of(tmp_path: Path):
    write(tmp_path / "in.jsonl", ROWS)
    write(tmp_path / "held.jsonl", [("8+8=", "16"), ("9+9=", "18")])
    build_tokenizer(tmp_path / "tokenizer")

    def build(**changes) -> Preparation:
        settings = {
            "inputs": (tmp_path / "in.jsonl",),
            "output": tmp_path / "out.jsonl",
            "report": tmp_path / "report.json",
            "held_out": (tmp_path / "held.jsonl",),
            "tokenizer": tmp_path / "tokenizer",
            "max_prompt_length": 15,
        }
        return Preparation(**settings | changes)

    return build


def test_every_row_is_kept_or_dropped_with_a_reason(request_of, tmp_path: Path):
    report = prepare_prompts(request_of())
    assert {reason: found["count"] for reason, found in report["dropped"].items()} == {
        "conflict": 2, "duplicate": 1, "overlap": 1, "too long": 1, "not an integer": 1,
    }  # fmt: skip
    assert report["rows"] == 8 == report["kept"] + sum(found["count"] for found in report["dropped"].values())
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["row"], row["prompt"], row["answer"], row["original_answer"]) for row in rows] == [
        (0, "1+1=", "2", None),
        (4, "3+3=", "6", "006"),
    ]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["dropped"]["conflict"]["examples"][0]["detail"] == "answers 4, 5"
    assert describe_report(report)[0] == "8 rows read, 2 kept"
    assert len(read_prompts(tmp_path / "out.jsonl", prompt_column="prompt", answer_column="answer")) == 2


def test_answers_may_stay(request_of, tmp_path: Path):
    report = prepare_prompts(request_of(integers=False, held_out=(), tokenizer=None, max_prompt_length=None))
    answers = [json.loads(line)["answer"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    # unread as integers, 2 and 4/2 contradict each other
    assert answers == ["006", "-34", "2.5", "16"] and report["respelled"] == 0


def test_parquet_with_conversations(request_of, tmp_path: Path):
    turns = [{"role": "user", "content": "9-9="}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"prompt": turns, "answer": 0}) + "\n")
    output = tmp_path / "out.parquet"
    prepare_prompts(request_of(inputs=(tmp_path / "in.jsonl", tmp_path / "chat.jsonl"), output=output))
    rows = pyarrow.parquet.read_table(output).to_pylist()
    assert rows[-1]["prompt"] == turns and rows[0]["prompt"] == [{"role": "user", "content": "1+1="}]
    assert (rows[-1]["source"], rows[-1]["row"]) == (str(tmp_path / "chat.jsonl"), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output": Path("out.csv")}, r"out.csv: unknown extension; the output must be .jsonl or .parquet"),
        ({"max_prompt_length": None}, "--tokenizer and --max-prompt-length go together"),
        ({"template": "no place"}, "must hold {prompt} once"),
        ({"columns": Columns(prompt="question")}, "no column data.prompt_column=question"),
    ],
)
def test_wrong_requests_write_nothing(request_of, tmp_path: Path, changes: dict, message: str):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(RequestError, match=message):
        prepare_prompts(request_of(**changes))
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_overwritten_unasked(request_of, tmp_path: Path):
    prepare_prompts(request_of())
    with pytest.raises(RequestError, match=r"out.jsonl exists; choose another name or allow --overwrite"):
        prepare_prompts(request_of())
    prepare_prompts(request_of(overwrite=True))
    with pytest.raises(RequestError, match=r"in.jsonl is read by this request"):
        prepare_prompts(request_of(output=tmp_path / "in.jsonl", overwrite=True))


def run_tool(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools" / "prepare_prompts.py"), *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


@pytest.mark.skipif(not DATA.is_dir(), reason="no data sets beside the repository")
def test_the_tool_on_gsm8k(tmp_path: Path):
    done = run_tool(
        DATA / "gsm8k-test.jsonl", "-o", tmp_path / "out.jsonl", "--prompt-column", "question", "--answer-after", "####"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "1319 rows read, 1319 kept"
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert report["kept"] == 1319 and report["respelled"] > 0  # 1,080 → 1080


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--integerize"], "--integerize needs --url with --served, or --model FOLDER"),
        (["--integerize", "--url", "host", "--served", "m"], "'host' is not an address like http://host:8000/v1"),
        (["--url", "http://host:1"], "--url, --served and --model belong to --integerize"),
    ],
)
def test_rewriting_needs_a_model(tmp_path: Path, options: list[str], message: str):
    write(tmp_path / "in.jsonl", ROWS)
    done = run_tool(tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", *options)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_rewriting_by_a_folder(tmp_path: Path):
    """A model with random weights: whatever it says is dropped, and kept in the journal."""
    write(tmp_path / "in.jsonl", [("1+1=", "2"), ("1:2=", "0.5"), ("8:", "x")])
    folder = write_model(tmp_path / "model", "qwen2", tied=True, vocab_size=20, max_position_embeddings=4096)
    build_tokenizer(folder)
    options = ("--integerize", "--model", folder, "--max-reply-tokens", 4)
    done = run_tool(tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", *options)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.jsonl.report.json").read_text())
    assert report["kept"] == 1
    assert report["integerize"]["dropped"] == {"malformed reply": 1, "answer not a real number": 1}
    assert len((tmp_path / "out.jsonl.journal.jsonl").read_text().splitlines()) == 2


def test_the_tool_refuses_in_one_line(tmp_path: Path):
    done = run_tool(tmp_path / "none.jsonl", "-o", tmp_path / "out.jsonl")
    assert done.returncode == 2 and done.stderr == f"dapo-megatron: {tmp_path / 'none.jsonl'}: no such file\n"
    assert list(tmp_path.iterdir()) == []
