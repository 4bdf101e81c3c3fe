import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.data.prompts import read_prompts
from dapo_megatron.rewards import extract_answer, grade
from dapo_megatron.rewards.rule import _last_balanced_box, _last_box

ROOT = Path(__file__).parents[2]
DATA = ROOT.parent / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no data sets beside the repository")


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so it is\nAnswer: 42", "42"),
        ("7-1=6;Answer: 6", "6"),
        ("Answer: 1\nno, wait\nAnswer: 2", "2"),
        ("Answer: 1 or rather Answer: 2", "2"),
        (r"\boxed{44}, and we check our answer: $17 \cdot 44 = 748$.", "44"),
        (r"thus \boxed{3}", "3"),
        (r"\boxed{3}" + "\nAnswer: 4", "4"),
        ("Answer: 4\n" + r"that is \boxed{3}", "3"),
        (r"Answer: $\boxed{5}$", "5"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"a stray { before \boxed{8}", "8"),
        (r"a stray } before \boxed{8}", "8"),
        (r"\boxed {9}", "9"),
        (r"\boxed{6} then cut short \boxed{7", "6"),
        ("Answer: 5\nAnswer:", "5"),
        ("**Answer:** 42", "42"),
        ("**Answer**: 42", "42"),
        ("ANSWER : 42", "42"),
        ("答案 Answer\N{FULLWIDTH COLON}42", "42"),
        ("Answer:\n\n42\nIndeed.", "42"),
        ("Answer: 42\r\nIndeed.", "42"),
        ("Answer: " + "x" * 400, "x" * 400),
        ("Answer: 1" + "\nfurther thoughts" * 100, "1"),
    ],
)
def test_extraction(response: str, answer: str):
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    "response", ["", "42", "the answer is 42", r"\boxed{42", "Answer:", "Answer: \n **", r"\boxed 4"]
)
def test_no_answer(response: str):
    assert extract_answer(response) is None
    assert not grade(response, "42")


@pytest.mark.parametrize(
    ("given_answer", "reference"),
    [
        ("25", "025"),
        ("025", "25"),
        ("$25$", "25"),
        (r"\$25", "25"),
        (r"\(25\)", "25"),
        ("25.", "25"),
        ("**25**", "25"),
        ("`25`", "25"),
        ("$25$.", "25"),
        ("+25", "25"),
        ("-25", "-25"),
        ("\N{MINUS SIGN}25", "-25"),
        ("-$25", "-25"),
        ("-0", "0"),
        ("000", "0"),
        ("1,080", "1080"),
        ("109,200,000", "109200000"),
        ("1{,}080", "1080"),
        (r"1\,080", "1080"),
        (r"1,\!080", "1080"),
        (r"11,\! 111,\! 111,\! 100", "11111111100"),
        ("142", "142.0"),
        ("142.0", "142"),
        ("336", r"336^\circ"),
        (r"336^{\circ}", "336"),
        (r"$336^\circ$.", r"336^\circ"),
        ("336°", "336"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"$\left( 3, \frac{\pi}{2} \right)$", r"(3,\frac{\pi}{2})"),
        ("Evelyn", "Evelyn"),
        ("9" * 5000, "9" * 5000),
        ("0" * 5000 + "7", "7"),
    ],
)
def test_equal_answers(given_answer: str, reference: str):
    assert grade(f"Answer: {given_answer}", reference)
    assert grade(f"so \\boxed{{{given_answer}}}", reference)


@pytest.mark.parametrize(
    ("given_answer", "reference"),
    [
        ("24", "25"),
        ("-25", "25"),
        ("250", "25"),
        ("2.5", "25"),
        ("25.5", "25"),
        ("25.01", "25"),
        ("4 2", "42"),
        ("4$2", "42"),
        ("4 $2$", "42"),
        ("1,08", "108"),
        ("10,80", "1080"),
        ("1,0800", "10800"),
        ("--25", "25"),
        ("+-25", "25"),
        ("25 or 26", "25"),
        ("25 apples", "25"),
        ("about 25", "25"),
        ("1e2", "100"),
        ("5**2", "25"),
        ("5*5", "25"),
        ("0x19", "25"),
        ("25/1", "25"),
        ("٢٥", "25"),
        ("evelyn", "Evelyn"),
        (r"\frac{2}{1}", r"\frac{1}{2}"),
        ("9" * 5000, "9" * 4999 + "8"),
        ("__import__('os').getpid()", "25"),
    ],
)
def test_near_misses(given_answer: str, reference: str):
    assert not grade(f"Answer: {given_answer}", reference)
    assert not grade(f"so \\boxed{{{given_answer}}}", reference)


def test_an_empty_answer_is_never_right():
    for reference in ("", "$", "."):
        assert not grade(r"\boxed{}", reference)
        assert not grade("Answer: $$", reference)


def test_only_the_last_answer_counts():
    assert not grade("Answer: 25\nAnswer: 26", "25")
    assert not grade(r"\boxed{25} or \boxed{26}", "25")
    assert grade("Answer: 26\nAnswer: 25", "25")


@given(st.integers(-(10**30), 10**30), st.integers(0, 5), st.text(alphabet="abc \n$\\{}", max_size=60))
def test_written_integers_are_found_and_right(value: int, zeros: int, before: str):
    sign = "-" if value < 0 else ""
    for written in (str(value), f"{value:,}", f"{sign}{'0' * zeros}{abs(value)}", f"${value}$."):
        assert grade(f"{before}\nAnswer: {written}\n", str(value))
        assert not grade(f"{before}\nAnswer: {written}\n", str(value + 1))


@given(st.text(), st.text())
def test_any_text_gets_a_verdict(response: str, answer: str):
    assert grade(response, answer) in (True, False)
    assert not grade(response, "")


@given(st.text(alphabet="Answer:boxed\\{}$ \n1,.^*", max_size=300))
def test_any_text_near_the_grammar_gets_a_verdict(response: str):
    answer = extract_answer(response)
    assert answer is None or answer in response


HOSTILE = [
    "Answer:",
    "Answer: ",
    "Answer" + "*" * 50,
    "Answer:\n",
    "Answer: 1\n",
    "Answer ",
    "Answer",
    "\\boxed{",
    "\\boxed{}",
    "\\boxed ",
    "\\boxed",
    "\\",
    "{",
    "}",
    "{}",
    "^",
    "^ ",
    "^{ ",
    "$",
    "1,000,",
    "1",
    "0",
    "9" * 999 + ",",
    " ",
    "\t\n",
    ".0",
    "+-",
    "((",
    "\\left",
    "°",
    "\U0001f600",
    "\ud800",
]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("unit", HOSTILE, ids=ascii)
def test_a_million_hostile_characters_end(unit: str):
    """A quadratic step would need hours here, far beyond the test's time limit."""
    text = unit * (1_000_000 // len(unit))
    frames = (
        "{}",
        "Answer: {}",
        "Answer: {}x",
        "Answer: ^{}x",
        "Answer: 1{}x",
        "\\boxed{{{}}}",
        "^{}\\circ \\boxed{{1}}",
    )
    for frame in frames:
        assert grade(frame.format(text), "no such answer") is False


@given(st.lists(st.sampled_from([r"\boxed{", r"\boxed {", r"\boxed", "{", "}", r"\{", r"\}", "\\", "7"]), max_size=30))
def test_the_last_box_is_that_of_a_scan_of_the_whole_text(pieces: list[str]):
    text = "".join(pieces)
    assert _last_box(text) == _last_balanced_box(text, 0)


def test_nothing_heavy_is_imported():
    code = "import sys, dapo_megatron.rewards; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


@needs_data
@pytest.mark.parametrize(("name", "rows"), [("aime24", 30), ("aime25", 30), ("dapo-math-17k", 17_917)])
def test_references_of_published_sets(name: str, rows: int):
    prompts = read_prompts(DATA / f"{name}.parquet", prompt_column="prompt", answer_column="reward_model.ground_truth")
    right = [grade(f"Some steps.\nAnswer: {prompt.answer}", prompt.answer) for prompt in prompts]
    assert right == [True] * rows
    assert not any(grade(f"Answer: {prompt.answer}", prompt.answer + "1") for prompt in prompts)


@needs_data
def test_references_of_amc():
    references = [row["answer"] for row in json.loads((DATA / "amc.json").read_text())]
    assert len(references) == 83
    assert all(grade(f"Answer: {reference}", str(reference)) for reference in references)
    assert all(grade(f"Answer: {int(reference)}", str(reference)) for reference in references)


@needs_data
def test_reference_solutions_of_math500_are_right():
    rows = [json.loads(line) for line in (DATA / "math500.jsonl").read_text(encoding="utf-8").splitlines()]
    wrong = [row["answer"] for row in rows if not grade(row["solution"], row["answer"])]
    assert (len(rows), wrong) == (500, [])


@needs_data
def test_gsm8k_references_with_thousands_separators():
    lines = (DATA / "gsm8k-test.jsonl").read_text(encoding="utf-8").splitlines()
    references = [json.loads(line)["answer"].rpartition("####")[2].strip() for line in lines]
    assert any("," in reference for reference in references)
    assert all(grade(f"Answer: {reference}", reference.replace(",", "")) for reference in references)
