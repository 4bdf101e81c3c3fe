"""The rule and mathematics together, on real references, near misses and hostile text."""

import json
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.rewards import grade
from dapo_megatron.rewards.guard import is_tame
from dapo_megatron.rewards.pool import GraderPool
from tests.rewards.hostile import hostile_responses

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no data sets beside the repository")

EQUAL = [
    (r"\frac{1}{2}", "0.5"),
    ("1/2", r"\frac{1}{2}"),
    (r"\frac12", r"\dfrac{1}{2}"),
    ("50\\%", "0.5"),
    ("50%", "50"),
    ("1.8", r"1\frac{4}{5}"),
    (r"\frac{9}{5}", r"1\frac45"),
    ("0.333333", "1/3"),
    (r"25\text{ cm}", "25"),
    ("x = 25", "25"),
    ("270/7", r"\frac{270}7\text{ degrees}"),
    ("18.9", r"\$18.90"),
    (".35625", "0.35625"),
    ("(1, 0.5)", r"\left(1, \frac{1}{2}\right)"),
    ("(0.6, 8/3]", r"\left(\frac{3}{5},\frac{8}{3}\right]"),
    (r"\{2,1\}", r"\{1,2\}"),
    ("2,1", "1,2"),
    ("5", "x=5"),
    ("[-2,7]", r"x \in [-2,7]"),
    ("x<5", r"(-\infty,5)"),
    ("(-∞, 2) ∪ (3, ∞)", r"(-\infty, 2) \cup (3, \infty)"),
    (r"\sqrt{12}", r"2\sqrt{3}"),
    (r"1/\sqrt{3}", r"\frac{\sqrt{3}}{3}"),
    ("6π", r"6\pi"),
    ("1+3x", "3x+1"),
    ("(x-1)(x+1)", "x^2-1"),
    (r"1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}"),
    (r"\begin{pmatrix} 0.5 \\ 2/3 \end{pmatrix}", r"\begin{pmatrix} 1/2 \\ 2/3 \end{pmatrix}"),
    ("52_{8}", "52_8"),
    ("Evelyn", r"\text{Evelyn}"),
    ("C", r"\text{(C)}"),
]

DIFFERENT = [
    ("0.33", "1/3"),
    ("0.0000673", ".0000672"),
    ("0.500001", "0.5"),
    ("-0.5", r"\frac{1}{2}"),
    (r"\frac{2}{1}", r"\frac{1}{2}"),
    (r"\frac{1}{0}", r"\frac{1}{2}"),
    (r"\sqrt{625}", "25"),
    ("5^2", "25"),
    (r"\frac{50}{2}", "25"),
    ("25.0000001", "25"),
    (r"25\text{ or }26", "25"),
    ("y=5", "x=5"),
    ("(2,1)", "(1,2)"),
    ("(4,3)", "(5,2)"),
    ("(3,4)", "(3,4]"),
    ("(1,2,3)", "(1,2)"),
    ("(-∞, 2)", r"(-\infty, 2) \cup (3, \infty)"),
    (r"-\sqrt{3}", r"\sqrt{3}"),
    ("52_9", "52_8"),
    (r"5\text{ m}", r"5.0\text{ cm}"),
    (r"15\text{ cm}^3", r"15.0\text{ cm}^2"),
    ("odd", r"\text{even}"),
    ("neve", r"\text{even}"),
    ("D", r"\text{(C)}"),
    ("3x+2", "3x+1"),
    ("9^9^9^9", r"3\pi"),
]


@pytest.mark.parametrize(("answer", "reference"), EQUAL)
def test_equal_mathematics(answer: str, reference: str):
    assert grade(f"Answer: {answer}", reference)
    assert grade(f"so \\boxed{{{answer}}}", reference)


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_different_mathematics(answer: str, reference: str):
    assert not grade(f"Answer: {answer}", reference)
    assert not grade(f"so \\boxed{{{answer}}}", reference)


@given(st.integers(-(10**6), 10**6), st.integers(1, 10**4), st.integers(-5, 5))
def test_fractions_are_compared_exactly(numerator: int, denominator: int, factor: int):
    reference = f"\\frac{{{numerator}}}{{{denominator}}}"
    for written in (f"{numerator}/{denominator}", f"\\frac{{{numerator * 7}}}{{{denominator * 7}}}"):
        assert grade(f"Answer: {written}", reference)
    if factor:
        assert not grade(f"Answer: {numerator + factor}/{denominator}", reference)


@given(st.integers(-(10**9), 10**9), st.integers(1, 8))
def test_decimals_are_compared_exactly(value: int, places: int):
    def written(number: int) -> str:
        digits = f"{abs(number):0{places + 1}d}"
        return f"{'-' if number < 0 else ''}{digits[:-places]}.{digits[-places:]}"

    assert grade(f"Answer: {written(value)}0", written(value))
    assert not grade(f"Answer: {written(value + 1)}", written(value))


@settings(deadline=None, max_examples=50)  # algebra's first use of a function imports it
@given(st.text(alphabet="0123456789.,/-+^_{}()[]\\ xfracsqrt%=!e", max_size=40))
def test_any_text_near_the_grammar_gets_a_verdict(answer: str):
    assert grade(f"Answer: {answer}", r"\frac{3\pi}{7}") in (True, False)


@pytest.mark.parametrize(
    "answer",
    [
        "9^9^9",
        "9^{9^9}",
        "(9^{99})^{99}",
        "2^{9999}",
        "2^{99\\cdot99}",
        "(99)!",
        "999!",
        "9!!",
        "1e999",
        "\\sum k",
        "7\0",
    ],
)
def test_what_would_be_huge_is_not_worked_out(answer: str):
    assert not is_tame(answer)


@pytest.mark.parametrize(
    "answer", ["x^8 + x^7 + 1", "\\frac{3\\sqrt{3}}{4}", "2^{10}", "(x+1)^2(x-1)^3", "5!", "e^{i\\pi}"]
)
def test_ordinary_answers_are_worked_out(answer: str):
    assert is_tame(answer)


def test_integer_references_need_no_algebra():
    code = (
        "import sys; from dapo_megatron.rewards import grade\n"
        "assert not grade('Answer: 7', '8') and not grade(r'\\boxed{\\sqrt{64}}', '8')\n"
        "assert grade('Answer: x = 8', '8')\n"
        "assert not {'sympy', 'math_verify', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


def math500() -> list[dict]:
    return [json.loads(line) for line in (DATA / "math500.jsonl").read_text(encoding="utf-8").splitlines()]


def near_misses(reference: str) -> Iterator[str]:
    """The reference with one of its integers off by one, and with its sign flipped where that makes another answer."""
    for number in re.finditer(r"(?<![\d.,])\d{1,9}(?!\d)", reference):
        for step in (1, -1):
            value = int(number[0]) + step
            if value >= 0:
                yield reference[: number.start()] + str(value) + reference[number.end() :]
    if reference != "0" and not re.search(r"\\pm|\\begin|\\text|\\cup|=", reference):
        if re.search(r"[+,-]", reference[1:]):
            yield f"-({reference})"
        else:
            yield reference[1:] if reference.startswith("-") else f"-{reference}"


@needs_data
def test_references_are_right_in_either_form():
    references = [row["answer"] for row in math500()]
    references += [str(row["answer"]) for row in json.loads((DATA / "amc.json").read_text())]
    for line in (DATA / "gsm8k-test.jsonl").read_text(encoding="utf-8").splitlines():
        references.append(json.loads(line)["answer"].rpartition("####")[2].strip())
    from dapo_megatron.data.prompts import read_prompts

    for name in ("aime24", "aime25"):
        path = DATA / f"{name}.parquet"
        rows = read_prompts(path, prompt_column="prompt", answer_column="reward_model.ground_truth")
        references += [row.answer for row in rows]
    assert len(references) == 500 + 83 + 1319 + 60
    wrong = [r for r in references if not (grade(f"Answer: {r}", r) and grade(f"\\boxed{{{r}}}", r))]
    assert wrong == []


@needs_data
@pytest.mark.timeout(300)
def test_near_misses_are_wrong():
    pairs = [(miss, row["answer"]) for row in math500() for miss in near_misses(row["answer"])]
    assert len(pairs) > 1500
    sample = random.Random(0).sample(pairs, 600)
    right = [pair for pair in sample if grade(f"Answer: {pair[0]}", pair[1])]
    assert right == []


@needs_data
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_all_near_misses_and_other_problems_answers_are_wrong():
    references = [row["answer"] for row in math500()]
    pairs = [(miss, reference) for reference in references for miss in near_misses(reference)]
    others, chosen = random.Random(1), [r for r in references if not re.fullmatch(r"-?\d+", r)]
    for reference in chosen:
        pairs += [(other, reference) for other in others.sample(chosen, 8)]
    # two problems may share an answer, written alike or as \frac14 and \frac{1}{4}
    same = {r"\frac14": r"\frac{1}{4}"}
    pairs = [(a, b) for a, b in pairs if same.get(a, a).replace(" ", "") != same.get(b, b).replace(" ", "")]
    right = [pair for pair in pairs if grade(f"\\boxed{{{pair[0]}}}", pair[1])]
    assert len(pairs) > 3000
    assert len(right) <= len(pairs) // 1000, right


def check_hostile(responses: list[str], reference: str) -> None:
    with GraderPool(2, 5.0, memory_limit_mib=512) as pool:
        right = pool.grade([*responses, f"Answer: {reference}"], [reference] * (len(responses) + 1))
        assert right.tolist() == [False] * len(responses) + [True]
        assert pool.failures == 0  # the guard leaves nothing for the limits to end


@pytest.mark.timeout(300)
def test_hostile_text_is_survived_within_the_limits():
    check_hostile([response for response in hostile_responses() if len(response) < 1000], r"\frac{3\sqrt{3}}{7}")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("reference", ["42", r"\frac{3\sqrt{3}}{7}"])
def test_long_hostile_text_is_survived_within_the_limits(reference: str):
    responses = hostile_responses()
    assert len(set(responses)) >= 600
    check_hostile(responses, reference)
