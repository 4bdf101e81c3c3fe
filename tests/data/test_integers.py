import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.data.integers import MOST_DIGITS, read_integer
from dapo_megatron.rewards import grade

SPELLINGS = [
    ("025", 25),
    ("336^\\circ", 336),
    ("90^{\\circ}", 90),
    ("142.0", 142),
    ("1,234", 1234),
    ("1{,}234", 1234),
    ("10,\\!080", 10080),
    ("\\$32,\\!348", 32348),
    ("$-7$", -7),
    ("\N{MINUS SIGN}7.", -7),
    ("+3", 3),
    ("- 4", -4),
    ("\\left(5\\right)", None),
    ("-0", 0),
]


@pytest.mark.parametrize(("answer", "value"), SPELLINGS)
def test_spellings(answer: str, value: int | None):
    assert read_integer(answer) == value


@pytest.mark.parametrize(
    "answer", ["", "1/2", "1.5", "12,34", "4 2", "x=5", "1e3", "52_8", "٣", "\\frac{6}{3}", "--1", "4\\, 2"]
)
def test_all_else_is_none(answer: str):
    assert read_integer(answer) is None


def test_huge_numbers_cost_nothing():
    assert read_integer("9" * MOST_DIGITS) is not None
    assert read_integer("9" * 1_000_000) is None


@pytest.mark.parametrize(("answer", "value"), [pair for pair in SPELLINGS if pair[1] is not None])
def test_the_grader_takes_them_for_the_same(answer: str, value: int):
    assert grade(f"Answer: {value}", answer)
    assert not grade(f"Answer: {value + 1}", answer)


@given(st.integers(), st.sampled_from(["{}", "0{}", "{:,}", "${}$", "{}.0", "{}^\\circ", " {}. "]))
def test_values_survive_their_spelling(value: int, form: str):
    text = form.format(value) if value >= 0 or form != "0{}" else str(value)
    assert read_integer(text) == value
    assert grade(f"Answer: {value}", text)
