"""The tiny programs: what the task calls right is what Python and the sandbox find right."""

import io
import json
import random
from contextlib import redirect_stdout

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.data.tokenizer import load_tokenizer
from dapo_megatron.rewards.code_tests import CodeTests, close_sandbox, last_program
from tools.programs_task import (
    VALIDATION,
    Program,
    Question,
    case_inputs,
    draw_program,
    draw_question,
    is_right,
    write_task,
)

OPERATION = st.tuples(st.sampled_from("+-*"), st.integers(1, 9))


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    write_task(folder)
    return folder


def rows(folder, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@settings(deadline=None)
@given(st.lists(OPERATION, min_size=1, max_size=6), st.booleans(), st.integers(-99, 99))
def test_a_program_prints_what_python_prints(operations, flat, number):
    program = Program(tuple(operations), flat)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(last_program(program.response), {"input": lambda: str(number)})
    assert int(printed.getvalue()) == program.output(number)


def test_questions_in_words():
    question = Question((("+", 3), ("*", 2)), twice=True)
    assert question.text == "+3,*2 twice" and Question(question.operations, twice=False).text == "+3,*2"
    steps = Program(question.all_operations)
    assert steps.output(1) == 22 and is_right(steps, question, [1, 2])
    assert steps.response == "```\nx=int(input())\nx+=3\nx*=2\nx+=3\nx*=2\nprint(x)\n```"
    flat = Program(question.all_operations, flat=True)
    assert flat.response == "```\nprint(int(input())+3*2+3*2)\n```" and not is_right(flat, question, [1])


def test_the_warm_start_draws_right_and_wrong():
    rng = random.Random(0)
    drawn = []
    for _ in range(400):
        question = draw_question(rng)
        drawn.append(is_right(draw_program(question, rng), question, case_inputs(question)))
    assert 0.45 < sum(drawn) / len(drawn) < 0.75


def test_the_sandbox_agrees_with_the_pairs(task):
    grade = CodeTests(30.0, 512, 20, False, 1.0, -1.0)
    try:
        for row in rows(task, "train")[:12]:
            assert grade(row["chosen"], row["answer"]).right and not grade(row["rejected"], row["answer"]).right
    finally:
        close_sandbox()


def test_files_and_tokens(task, tmp_path):
    write_task(tmp_path)
    for name in ("train", "validation", "warm"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (task / f"{name}.jsonl").read_bytes()
    held_out = {row["prompt"] for row in rows(task, "validation")}
    assert len(held_out) == VALIDATION
    assert not held_out & {row["prompt"] for name in ("train", "warm") for row in rows(task, name)}
    tokenizer = load_tokenizer(task / "tokenizer")
    texts = [text for row in rows(task, "train") for text in (row["prompt"], row["chosen"], row["rejected"])]
    encoded = tokenizer(texts)["input_ids"]
    assert tokenizer.batch_decode(encoded) == texts and max(map(len, encoded)) < 32
    assert all(tokenizer.eos_token_id not in ids for ids in encoded)
