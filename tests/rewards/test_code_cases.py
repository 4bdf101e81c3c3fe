"""Test cases as public data sets write them, and when outputs agree."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.data.prompts import read_prompts
from dapo_megatron.errors import RequestError
from dapo_megatron.rewards.code_cases import TestCases, check_cases, read_cases, same_output, same_result
from dapo_megatron.rewards.code_tests import last_program

PROBLEMS = Path(__file__).with_name("code_problems.jsonl")
SUM = '{"inputs": ["1 2"], "outputs": ["3"]}'


def test_the_forms_of_public_sets():
    prompts = read_prompts(PROBLEMS, prompt_column="prompt", answer_column="answer")
    stdin, called, listed = (read_cases(prompt.answer) for prompt in prompts)
    assert stdin == TestCases(("1 2\n", "3\n4 5"), ("3\n", "12"), None)
    assert called == TestCases(([1, 2], [-1, 1]), (3, [0]), "add")
    assert listed == TestCases(([[1, 2, 3]],), ([1, 2],), "pair")
    lines = {"type": "stdin_stdout", "fn_name": None, "input": ["1", "2"], "output": "3"}
    assert read_cases(json.dumps([lines])) == TestCases(("1\n2",), ("3",), None)
    two = {"fn_name": "f", "input": '1\n"a"\n', "output": "no JSON"}
    assert read_cases(json.dumps([two])) == TestCases(([1, "a"],), ("no JSON",), "f")
    for metadata in ({"func_name": "f"}, '{"func_name": "f"}'):
        called = {"input": "1", "output": "2", "testtype": "functional", "metadata": metadata}
        assert read_cases(json.dumps([called])) == TestCases(([1],), (2,), "f")
    plain = {"input": "1", "output": "2", "testtype": "stdin", "metadata": "a remark"}
    assert read_cases(json.dumps([plain])) == TestCases(("1",), ("2",), None)
    # what is typed already stays as it is: a text of digits is no number
    assert read_cases('{"fn_name": "f", "inputs": [["1"]], "outputs": ["1"]}') == TestCases((["1"],), ("1",), "f")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("42", r'is neither {"inputs'),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"inputs": [], "outputs": []}', "has 0 inputs and 0 outputs"),
        ("[]", "has 0 inputs and 0 outputs"),
        ('{"inputs": ["1"], "outputs": []}', "has 1 inputs and 0 outputs"),
        ('{"inputs": [1], "outputs": ["1"]}', r"has an input 0 \(from 0\) that is no text"),
        ('{"inputs": ["1"], "outputs": [1]}', r"has an output 0 \(from 0\) that is no text"),
        ('{"fn_name": "f", "inputs": [1], "outputs": [1]}', r"input 0 \(from 0\) that is not a list of arguments"),
        ('{"fn_name": "f", "inputs": ["x"], "outputs": [1]}', r"input 0 \(from 0\) whose lines are not JSON"),
        ('{"fn_name": "f()", "inputs": [[1]], "outputs": [1]}', "no name of a function"),
        ('[{"input": "1"}]', r"has a case 0 \(from 0\) that is not"),
        ('[{"fn_name": "f", "input": "1", "output": "1"}, {"input": "1", "output": "1"}]', "of several functions"),
        ('[{"testtype": "functional", "input": "1", "output": "1"}]', r"case 0 \(from 0\) with testtype=functional"),
        (
            '[{"testtype": "functional", "input": "1", "output": "1", "metadata": "{\\"func_name\\": null}"}]',
            r"neither fn_name nor metadata\.func_name",
        ),
        ('[{"type": "function_call", "fn_name": null, "input": "1", "output": "1"}]', "with type=function_call and"),
    ],
)
def test_answers_that_are_no_test_cases_are_refused(answer: str, message: str):
    with pytest.raises(ValueError, match=message):
        read_cases(answer)
    with pytest.raises(RequestError, match=r"x\.jsonl row 7 \(from 0\): with reward\.grader=code the answer "):
        check_cases([(3, SUM), (7, answer)], "x.jsonl")
    check_cases([(3, SUM)], "x.jsonl")


def test_the_longest_inputs_are_kept_in_their_order():
    cases = TestCases(("1", "333", "22", "4444"), ("a", "b", "c", "d"), None)
    assert cases.hardest(2) == TestCases(("333", "4444"), ("b", "d"), None)
    assert cases.hardest(4) is cases
    called = TestCases(([1], [[1, 2, 3]]), (1, 2), "f")
    assert called.hardest(1) == TestCases(([[1, 2, 3]],), (2,), "f")


@pytest.mark.parametrize(
    ("given_", "expected", "same"),
    [
        ("3\n", "3", True),
        ("1 2  \n3\n\n", "1 2\n3", True),
        ("1\r\n2\r\n", "1\n2", True),
        ("1 2", "1\n2", False),
        ("1  2", "1 2", True),
        ("0.3333333", "0.33333333", True),
        ("0.334", "0.333", False),
        ("2.0", "2", True),
        ("10000001", "10000000", False),  # integers are never near enough
        ("10000001.0", "10000000", False),
        ("10000000.00", "10000000", True),
        ("12345678901234567891.0", "12345678901234567890", False),
        ("10000001", "10000000.0", True),
        ("01", "1", False),
        ("1e3", "1000", True),
        ("nan", "nan", True),
        ("inf", "1.0", False),
        ("yes 0.50", "yes 0.5", True),
        ("yes 0.5", "no 0.5", False),
        ("", "", True),
        ("x", "", False),
    ],
)
def test_outputs_agree_line_by_line(given_: str, expected: str, same: bool):
    assert same_output(given_, expected) is same


@pytest.mark.parametrize(
    ("given_", "expected", "same"),
    [
        (3, 3, True),
        (3, 3.0, True),
        (10000001.0, 10000000, False),
        (10000000.0, 10000000, True),
        (10000001, 10000000.0, True),
        (3, "3", False),
        (True, 1, False),
        (1, True, False),
        (None, None, True),
        (0.1 + 0.2, 0.3, True),
        ([1, [2, 0.5]], [1, [2, 0.5 + 1e-9]], True),
        ([1, 2], [2, 1], False),
        ([1], [1, 1], False),
        ({"a": [1]}, {"a": [1]}, True),
        ({"a": 1}, {"b": 1}, False),
        (10**400, 0.5, False),
        (float("nan"), 0.5, False),
    ],
)
def test_results_agree_by_value_and_type(given_, expected, same: bool):
    assert same_result(given_, expected) is same


@given(st.lists(st.lists(st.text("abc0123456789-_,.", min_size=1), max_size=4), max_size=4))
def test_an_output_agrees_with_itself_and_with_no_longer_one(lines: list[list[str]]):
    text = "\n".join(" ".join(words) for words in lines)
    assert same_output(text, text)
    assert not same_output(f"{text}\nmore", text)


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("no code", None),
        ("```python\nx = 1", None),
        ("```\nx = 1\n```", "x = 1"),
        ("```python\nx = 1\n```\ntext\n```py\nx = 2\n```", "x = 2"),
        ("```python\nx = '```'\n```", "x = '```'"),
        ("```python\nleft open\n```python\nx = 3\n```", "x = 3"),
        ("1. So:\n  ```python\n  if x:\n    y = 4\n  ```", "if x:\n  y = 4"),
        ("```python\nx = 5\n```\n```python\ncut", "x = 5"),
        ("```a\n" * 100_000, None),
    ],
)
def test_the_last_closed_block_is_the_program(response: str, program: str | None):
    assert last_program(response) == program
