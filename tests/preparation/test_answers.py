import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.preparation.answers import exact_integer, exact_value
from dapo_megatron.preparation.expressions import ExpressionError

DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("025", 25),
        ("142.0", 142),
        ("1{,}234", 1234),
        ("11,\\! 111,\\! 111,\\! 100", 11_111_111_100),
        ("336^\\circ", 336),
        ("\\frac{6}{3}", 2),
        ("-\\dfrac{12}{4}", -3),
        ("$\\frac63$", 2),
        ("\\sqrt{16}", 4),
        ("\\sqrt9", 3),
        ("2^{10}", 1024),
        ("3 \\cdot 4", 12),
        ("\\left(5\\right)", 5),
        ("\\frac{\\sqrt{8}}{\\sqrt{2}}", 2),
        ("\\frac{\\frac{1}{2}}{\\frac14}^\\circ", 2),
    ],
)
def test_exactly_integers(answer: str, value: int):
    assert exact_integer(answer) == value


@pytest.mark.parametrize(
    "answer",
    [
        "\\frac{7}{3}", "0.5", "\\pi", "(1,234)", "1,-2", "x=5", "52_8", "1\\frac{4}{5}", "2\\frac{6}{3}",
        "15\\mbox{ cm}^2", "5 \\text{ cents}", "\\pm 3", "2k", "1+2i", "2^10", "\\sqrt12", "\\sqrt[3]{8}",
        "\\frac{1}{0}", "9^{9^{9^{9}}}", "\\frac{" * 400, "\\text{Evelyn}", "",
    ],
)  # fmt: skip
def test_nothing_is_guessed(answer: str):
    assert exact_integer(answer) is None


@given(st.integers(-999, 999), st.integers(1, 99))
@settings(deadline=None)
def test_fractions(numerator: int, denominator: int):
    answer = f"\\frac{{{numerator}}}{{{denominator}}}"
    assert exact_integer(answer) == (None if numerator % denominator else numerator // denominator)


@given(st.text(alphabet="\\{}frac sqrt0123456789^_,.!$-()", max_size=40))
@settings(deadline=None, max_examples=300)
def test_any_text_has_a_value_or_is_refused(answer: str):
    try:
        exact_value(answer)
    except ExpressionError:
        assert exact_integer(answer) is None


@pytest.mark.skipif(not DATA.is_dir(), reason="no data sets beside the repository")
def test_the_answers_of_math500():
    answers = [json.loads(line)["answer"] for line in (DATA / "math500.jsonl").read_text().splitlines()]
    integers = [answer for answer in answers if exact_integer(answer) is not None]
    assert len(integers) == 330
    real = 0
    for answer in set(answers) - set(integers):
        try:
            exact_value(answer)
            real += 1
        except ExpressionError:
            continue
    assert real >= 70  # fractions, roots, multiples of π: what rewriting can start from
