import io
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.monitoring import Console, step_text

STEP = {
    "step": 3,
    "accuracy/train": 0.5123,
    "reward/mean": 0.024,
    "entropy/mean": 0.2131,
    "response_length/mean": 33.14,
    "time/rollout": 0.8,
    "time/learn": 1.2,
    "time/reshard": 0.01,
    "time/step": 2.0,
    "tokens/trained": 6000,
    "tokens/generated": 10400,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def plain(total=40, **settings):
    stream = io.StringIO()
    return Console(total, stream=stream, **settings), stream


def test_a_plain_step_line_shows_everything():
    console, stream = plain()
    console.step(STEP)
    assert stream.getvalue() == (
        "step  3/40  train 0.512  reward +0.024  entropy 0.213  length 33.1  "
        "rollout 0.80s  learn 1.20s  reshard 0.01s  tokens/s 5,200  ETA 1m14s\n"
    )


def test_a_validation_step_line_shows_both_accuracies():
    console, stream = plain()
    console.step({"step": 0, "validation/accuracy": 0.35, "validation/accuracy_greedy": 0.2})
    console.step({**STEP, "validation/accuracy": 0.83, "validation/accuracy_greedy": 0.95})
    first, second = stream.getvalue().splitlines()
    assert first == "step  0/40  validation 0.350  greedy 0.200"
    assert "  validation 0.830  greedy 0.950  " in second


@settings(deadline=None)
@given(
    st.dictionaries(st.sampled_from([key for key in STEP if key != "step"]), st.none() | st.floats()),
    st.integers(0, 50),
)
def test_any_metric_may_be_missing_or_not_finite(metrics, step):
    for quiet in (True, False):
        stream = io.StringIO()
        with Console(40, quiet, stream=stream) as console:
            console.step({"step": step, **metrics})
        assert f"{step}/40" in stream.getvalue()


def test_eta_follows_the_clock_and_ends_with_the_last_step():
    clock = Clock()
    console, stream = plain(total=12, clock=clock)
    for step in (1, 2, 3, 12):
        clock.now += 10.0  # though the step itself says 2 s: validation and checkpoints count
        console.step({**STEP, "step": step})
    ends = [line.rsplit("  ", 1)[1] for line in stream.getvalue().splitlines()]
    assert ends[1:3] == ["ETA 1m40s", "ETA 1m30s"]
    assert "ETA" not in ends[3]


def test_tokens_per_second_falls_back_to_trained_tokens():
    assert step_text.tokens_per_second({"tokens/trained": 10, "time/step": 2.0}) == 5.0
    assert step_text.tokens_per_second({"tokens/trained": 10, "tokens/generated": 30, "time/step": 2.0}) == 15.0
    assert step_text.tokens_per_second({"tokens/trained": 10, "time/step": 0.0}) is None
    assert step_text.tokens_per_second({"time/step": 1.0}) is None


@pytest.mark.parametrize("total", [1, 7, 20, 555, 10_000])
def test_a_supervised_stage_prints_some_lines_and_its_last(total):
    console, stream = plain()
    for step in range(1, total + 1):
        console.supervised(step, total, loss=1.5, seconds=0.2)
    lines = stream.getvalue().splitlines()
    assert 1 <= len(lines) <= 45
    assert f"{total}/{total}  loss 1.5000  0.20s a step" in lines[-1] and "ETA" not in lines[-1]
    assert lines[0].split()[1] == f"1/{total}"


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_notes_and_alerts_cannot_steer_the_terminal(stream, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    out = stream()
    with Console(5, stream=out) as console:
        console.note("[red]x[/red] \x1b]0;title\x07\ud800 é")
        console.alert("entropy \x9b31m")
    text = out.getvalue()
    assert "[red]x[/red]" in text and r"\x1b]0;title\x07" in text and "é" in text
    assert "\x1b]0" not in text and "\x07" not in text and "\x9b" not in text
    assert "ALERT  entropy" in text


def test_a_stream_that_cannot_encode_gets_escapes():
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    Console(5, stream=stream).note("7 → 8")
    assert raw.getvalue() == b"7 \\u2192 8\n"


def test_a_closed_pipe_silences_the_console():
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w")  # noqa: SIM115
    console = Console(5, stream=stream)
    console.step(STEP)
    console.note("still here")
    console.close()
    with pytest.raises(BrokenPipeError):
        stream.close()


def test_a_stream_of_no_terminal_or_a_dumb_one_is_plain(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with Console(40, stream=stream) as console:
        console.step(STEP)
    assert "\x1b" not in stream.getvalue() and stream.getvalue().count("\n") == 1


def test_the_live_form_draws_progress_and_gives_the_terminal_back(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    with Console(40, stream=stream) as console:
        console.supervised(1, 2, 1.5, 0.1)
        console.supervised(2, 2, 1.25, 0.1)
        console.step({**STEP, "step": 1})
        console.step({**STEP, "validation/accuracy": 0.83})
        console.note("a note")
    text = stream.getvalue()
    for part in ("supervised 2/2  loss 1.2500", "step 3/40", "0.512", "5,200", "validation 0.830", "a note", "▅▅"):
        assert part in text
    # cursor hidden, then shown again
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l")


def test_close_twice_and_close_unused():
    for stream in (io.StringIO(), Terminal()):
        console = Console(3, stream=stream)
        console.close()
        console.close()
        assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (187, "3m07s"), (7500, "2h05m"), (356400, "4d03h")]
)
def test_duration(seconds, text):
    assert step_text.duration(seconds) == text


def test_sparkline_is_on_a_fixed_scale():
    assert step_text.sparkline([0.0, 1.0, 0.5, math.nan, 7.0, -1.0]) == "▁█▅ █▁"
