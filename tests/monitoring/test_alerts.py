import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.monitoring import AlertBook, alerts_for

HEALTHY = {
    "entropy/mean": 0.4,
    "response_length/mean": 40.0,
    "accuracy/train": 0.5,
    "mismatch/logprob_abs_mean": 1e-4,
    "tokens/trained": 2000,
}


def fired(history, **settings):
    return [text.split(":")[0] for text in alerts_for(history, **settings)]


def test_a_healthy_or_empty_history_is_silent():
    assert alerts_for([]) == []
    assert alerts_for([{"step": 0}, HEALTHY, HEALTHY], mismatch_bound=0.5) == []


@pytest.mark.parametrize(
    ("first", "last", "expected"),
    [
        (1.0, 0.03, ["entropy collapse"]),
        (2.0, 0.06, []),  # under a twentieth, but not low
        (0.4, 0.03, []),  # low, but not under a twentieth
        (2.0, 0.05, []),  # at the floor
        (0.8, 0.041, []),  # low, and just above a twentieth
    ],
)
def test_entropy_collapse_needs_both_bounds(first, last, expected):
    history = [{"step": 0}, {"entropy/mean": first}, {"entropy/mean": 0.3}, {"entropy/mean": last}]
    assert fired(history) == expected


def test_length_collapse():
    assert fired([{"response_length/mean": 100.0}, {"response_length/mean": 29.9}]) == ["length collapse"]
    assert fired([{"response_length/mean": 100.0}, {"response_length/mean": 30.0}]) == []


def validations(train, validation):
    return [{"accuracy/train": a, "validation/accuracy": v} for a, v in zip(train, validation, strict=True)]


def ramp(start, end, count=10):
    return [start + (end - start) * i / (count - 1) for i in range(count)]


@pytest.mark.parametrize(
    ("train", "validation", "expected"),
    [
        (ramp(0.5, 0.6), ramp(0.5, 0.45), ["divergence"]),
        (ramp(0.5, 0.59), ramp(0.5, 0.4), []),
        (ramp(0.5, 0.9), ramp(0.5, 0.46), []),
        (ramp(0.5, 0.9, 9), ramp(0.5, 0.1, 9), []),  # too few points to tell
    ],
)
def test_divergence_of_train_and_validation(train, validation, expected):
    assert fired(validations(train, validation)) == expected


def test_divergence_looks_at_the_last_ten_points_only():
    rising = validations(ramp(0.2, 0.5), ramp(0.2, 0.5))
    falling = validations(ramp(0.5, 0.7), ramp(0.5, 0.4))
    assert fired(rising + falling) == ["divergence"]
    assert fired(falling + rising) == []


def test_divergence_between_validations_that_carry_no_training_accuracy():
    rows = []
    for a, v in zip(ramp(0.5, 0.7), ramp(0.5, 0.4), strict=True):
        rows += [{"validation/accuracy": v}, {"accuracy/train": a}]
    assert fired(rows) == ["divergence"]


@pytest.mark.parametrize(
    ("value", "bound", "expected"),
    [(0.6, 0.5, True), (0.5, 0.5, False), (math.nan, 0.5, True), (math.inf, 0.5, True), (9.0, None, False)],
)
def test_mismatch(value, bound, expected):
    assert bool(fired([{"mismatch/logprob_abs_mean": value}], mismatch_bound=bound)) is expected


def test_nothing_trained_names_a_cause():
    (text,) = alerts_for([HEALTHY, {"tokens/trained": 0}])
    assert text.startswith("nothing trained") and "likely cause" in text and "\n" not in text


def test_a_step_without_the_key_leaves_the_alert_as_it_was():
    assert fired([{"tokens/trained": 0}, {"step": 2}]) == ["nothing trained"]
    assert fired([{"tokens/trained": 0}, {"tokens/trained": None}]) == ["nothing trained"]


def test_the_book_tells_an_alert_once_until_it_clears():
    book = AlertBook()
    told = [len(book.update({"tokens/trained": tokens})) for tokens in (5, 0, 0, 0, 5, 0, 0)]
    assert told == [0, 1, 0, 0, 0, 1, 0]


def test_the_book_tells_a_second_alert_while_the_first_holds():
    book = AlertBook(mismatch_bound=0.5)
    assert book.update(HEALTHY) == []
    assert [t.split(":")[0] for t in book.update({**HEALTHY, "tokens/trained": 0})] == ["nothing trained"]
    worse = {**HEALTHY, "tokens/trained": 0, "mismatch/logprob_abs_mean": 2.0}
    assert [t.split(":")[0] for t in book.update(worse)] == ["mismatch"]
    # the number differs, the alert is the same
    assert book.update({**worse, "mismatch/logprob_abs_mean": 3.0}) == []


def test_a_resumed_book_knows_the_first_values():
    history = [{"entropy/mean": 1.0}, {"entropy/mean": 0.5}]
    assert AlertBook(history=history).update({"entropy/mean": 0.04}) != []
    assert AlertBook().update({"entropy/mean": 0.04}) == []


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from([*HEALTHY, "validation/accuracy", "step"]),
            st.none() | st.floats() | st.integers(-5, 5),
        ),
        max_size=25,
    )
)
def test_any_history_is_taken_and_the_book_agrees_with_the_function(history):
    book = AlertBook(mismatch_bound=0.5)
    before: set[str] = set()
    for end in range(1, len(history) + 1):
        fresh = {text.split(":")[0] for text in book.update(history[end - 1])}
        now = set(fired(history[:end], mismatch_bound=0.5))
        assert fresh == now - before
        before = now


@pytest.mark.parametrize("key", ["loss/policy", "grad_norm", "entropy/mean", "reward/mean"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_a_number_is_told(key, value):
    assert fired([HEALTHY, {**HEALTHY, key: value}]) == ["not a number"]
    # of the last step alone: older ones have been told
    assert fired([{**HEALTHY, key: value}, HEALTHY]) == []


@pytest.mark.parametrize(
    ("counts", "responses", "expected"),
    [
        ([11], 1000, ["grader failures"]),
        ([10], 1000, []),
        ([11, 10], 1000, []),  # each step's own
        ([50, 11], 1000, ["grader failures"]),
        ([1], 4, ["grader failures"]),
        ([5], None, []),
    ],
)
def test_grader_failures_are_a_share_of_the_step(counts, responses, expected):
    rows = [{"grader/failures": count, "responses/generated": responses} for count in counts]
    assert fired([HEALTHY, *rows]) == expected


def test_judge_fallbacks():
    step = {"judge/judged": 95.0, "judge/fallbacks": 5.0, "judge/no_verdict": 5.0, "judge/unreachable": 0.0}
    assert fired([{**HEALTHY, **step}]) == []
    (text,) = alerts_for([{**HEALTHY, **step, "judge/fallbacks": 6.0}])
    assert text.startswith("judge fallbacks: 6 of 101 responses") and "without YES or NO" in text
    (text,) = alerts_for([{**HEALTHY, **step, "judge/fallbacks": 6.0, "judge/unreachable": 1.0}])
    assert text.endswith("reward.judge.url or the judge's engine is down or slow")


def test_shortfall():
    assert fired([{**HEALTHY, "groups/shortfall": 0.0}]) == []
    (text,) = alerts_for([{**HEALTHY, "groups/shortfall": 3.0}])
    assert text.startswith("shortfall: 3 groups fewer than rollout.prompts_per_step")
    assert fired([{**HEALTHY, "groups/shortfall": 3.0}, HEALTHY]) == []
