from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.data.prompt_template import apply_template
from dapo_megatron.data.prompts import Prompt, read_prompts
from dapo_megatron.data.repeats import describe_repeats, find_overlap, find_repeats, repeats_to_drop

DATA = Path(__file__).parents[3] / "shared" / "data"
PUBLISHED = {"prompt_column": "prompt", "answer_column": "reward_model.ground_truth"}


def prompts_of(*rows: tuple[str, str]) -> list[Prompt]:
    return [Prompt(i, question, answer) for i, (question, answer) in enumerate(rows)]


ROWS = prompts_of(("a", "1"), ("b", "2"), ("a ", "01"), ("b", "3"), ("c", "4"), (" b\n", "2.0"))


def test_repeats_and_conflicts_are_told_apart():
    repeats = find_repeats(ROWS)
    assert repeats.groups == ((0, 2), (1, 3, 5))
    assert repeats.conflicts == ((1, 3, 5),)
    assert repeats.surplus == 3
    assert describe_repeats(ROWS, repeats) == [
        "3 of 6 prompts repeat an earlier question: rows 0, 2; rows 1, 3, 5",
        "1 questions have conflicting answers: rows 1, 3, 5 say 2, 3, 2.0",
    ]
    assert describe_repeats(ROWS[:2], find_repeats(ROWS[:2])) == []


def test_what_goes():
    repeats = find_repeats(ROWS)
    conflict = dict.fromkeys((1, 3, 5), "conflict")
    assert repeats_to_drop(ROWS, repeats, duplicates=False, conflicts=False) == {}
    assert repeats_to_drop(ROWS, repeats, duplicates=True, conflicts=False) == {2: "duplicate", 5: "duplicate"}
    assert repeats_to_drop(ROWS, repeats, duplicates=False, conflicts=True) == conflict
    assert repeats_to_drop(ROWS, repeats, duplicates=True, conflicts=True) == conflict | {2: "duplicate"}


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from(["1", "01", "2", "x"])), max_size=12))
def test_nothing_is_left_to_drop_after_dropping(rows: list[tuple[str, str]]):
    prompts = prompts_of(*rows)
    gone = repeats_to_drop(prompts, find_repeats(prompts), duplicates=True, conflicts=True)
    left = [prompt for i, prompt in enumerate(prompts) if i not in gone]
    assert find_repeats(left).groups == ()
    contradicted = {q for q, _ in rows if len({a.lstrip("0") for other, a in rows if other == q}) > 1}
    assert {prompt.text for prompt in left} == {q for q, _ in rows} - contradicted


def test_overlap_sees_through_templates():
    training = [apply_template(prompt, "dapo-math") for prompt in ROWS]
    held_out = prompts_of(("z", "1"), ("Now, here is the question: c", "4"), ("b", "9"))
    assert find_overlap(training, held_out) == [(1, 2), (3, 2), (5, 2)]
    assert find_overlap(training, held_out, "Now, here is the question: {prompt}") == [(1, 2), (3, 2), (4, 1), (5, 2)]


@pytest.mark.skipif(not DATA.is_dir(), reason="no data sets beside the repository")
def test_the_published_training_set():
    training = read_prompts(DATA / "dapo-math-17k.parquet", **PUBLISHED)
    repeats = find_repeats(training)
    # by exact text 17,290 are unique and 11 contradict themselves; white space hides 102 more and one
    assert (len(training) - repeats.surplus, len(repeats.conflicts)) == (17_188, 12)
    assert find_overlap(training, read_prompts(DATA / "aime24.parquet", **PUBLISHED)) == []
    math500 = read_prompts(DATA / "math500.jsonl", prompt_column="problem", answer_column="answer")
    assert len(find_overlap(training, math500)) == 4
