import base64
import json
import math
import re
import struct
from html.parser import HTMLParser

import pytest

from dapo_megatron.errors import RequestError
from dapo_megatron.monitoring import MetricsFile, write_report
from dapo_megatron.monitoring.histograms import histogram
from dapo_megatron.monitoring.report_figure import draw_report, time_shares
from dapo_megatron.monitoring.report_page import render_page
from dapo_megatron.monitoring.run_record import read_runs

HOSTILE = (
    "7-1=6;</pre><script>alert(1)</script><img src=x onerror=alert(2)>\" onmouseover='x' "
    "<a href='http://evil.example'>&lt;\x00\x1b[31m\ud800 \u202egnp"
)


def make_run(folder, steps=6, learning_rate=1e-4, samples=(), supervised=0, **changes):
    metrics = MetricsFile(folder / "metrics.jsonl")
    metrics.append({"step": 0, "validation/accuracy": 0.35, "validation/accuracy_greedy": 0.2})
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "accuracy/train": 0.4 + 0.05 * step,
            "reward/mean": -0.2 + 0.1 * step,
            "entropy/mean": 0.4 / step,
            "probability/mean": 0.9,
            "response_length/mean": 30.0 + step,
            "clip_fraction/low": 0.001,
            "clip_fraction/high": 0.002,
            "clip_fraction/dual": 0.0,
            "groups/all_right": 0.1 * step,
            "groups/all_wrong": 0.1,
            "truncated_fraction": 0.02,
            "grad_norm": math.nan if step == 3 else 0.5,
            "mismatch/logprob_abs_mean": 1e-5,
            "time/rollout": 1.0,
            "time/learn": 2.0,
            "time/reshard": 0.5,
            "time/step": 4.0,
            "tokens/trained": 1000,
            "tokens/generated": 2000,
            "packing/efficiency": 0.9,
        }
        if step == steps:
            row |= {"validation/accuracy": 0.875, "validation/accuracy_greedy": 0.953}
        metrics.append(row | changes)
    for step in range(1, supervised + 1):
        MetricsFile(folder / "supervised.jsonl").append({"supervised_step": step, "loss/supervised": 2.0 / step})
    for sample in samples:
        MetricsFile(folder / "samples.jsonl").append(sample)
    (folder / "config.yaml").write_text(f"optimizer:\n  learning_rate: {learning_rate}\nrun:\n  seed: 1\n")
    return folder


def sample(when, response, right=False, step=0):
    return {"step": step, "prompt": "7-1=", "response": response, "answer": "6", "right": right, "when": when}


class Page(HTMLParser):
    """Tags with their attributes, and the text a reader sees."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.texts = [], []
        self.feed(html)
        self.text = "".join(self.texts)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.texts.append(data)


def png_size(content):
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def test_the_report_holds_the_picture_the_numbers_and_the_recipe(tmp_path):
    run = make_run(tmp_path / "tiny", supervised=5)
    png, html = write_report([run])
    assert (png, html) == (run / "report.png", run / "report.html")
    assert png_size(png.read_bytes()) == (1600, 3000)
    page = Page(html.read_text(encoding="utf-8"))
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    head, encoded = image["src"].split(",")
    assert head == "data:image/png;base64" and base64.b64decode(encoded) == png.read_bytes()
    assert "0.350 → 0.875 (best 0.875 at step 6)" in page.text
    assert "0.200 → 0.953 (best 0.953 at step 6)" in page.text
    assert "12,000" in page.text and "6,000" in page.text  # tokens generated, trained
    assert "25.0% / 50.0% / 12.5%, other 12.5%" in page.text
    assert "learning_rate: 0.0001" in page.text
    assert {item.name for item in run.iterdir()} == {
        *("metrics.jsonl", "supervised.jsonl", "config.yaml", "report.png", "report.html")
    }


def test_hostile_completions_are_text_and_nothing_else(tmp_path):
    hostile = [
        sample("before", HOSTILE),
        sample("after", HOSTILE, right=True, step=6) | {"prompt": HOSTILE, "answer": HOSTILE},
        sample(HOSTILE, HOSTILE) | {"step": HOSTILE},
    ]
    run = make_run(tmp_path / "<b>run & co", samples=hostile)
    (run / "config.yaml").write_text(f"note: {json.dumps(HOSTILE)}\n")
    html = write_report([run])[1].read_text(encoding="utf-8")
    assert "<script" not in html.lower() and "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "\x00" not in html and "\x1b" not in html
    page = Page(html)
    assert "</pre><script>alert(1)</script><img src=x onerror=alert(2)>\" onmouseover='x'" in page.text
    known = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "img", "div", "pre", "span"}
    known |= {"table", "thead", "tbody", "tr", "th", "td", "details", "summary"}
    assert {tag for tag, _ in page.tags} <= known
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 1
    names = {name for _, attributes in page.tags for name in attributes}
    assert names <= {"lang", "charset", "http-equiv", "content", "name", "class", "alt", "src"}
    assert not re.search(r"https?://", re.sub(r"<pre>.*?</pre>|<div class=\"dim\">.*?</div>", "", html, flags=re.S))
    assert all(a["src"].startswith("data:image/png;base64,") for _, a in page.tags if "src" in a)


def test_samples_stand_before_beside_after_under_their_prompt(tmp_path):
    samples = [sample("after", "six, after", True, 6), sample("during", "six, during"), sample("before", "six, before")]
    page = Page(write_report([make_run(tmp_path / "r", samples=samples)])[1].read_text(encoding="utf-8"))
    places = [page.text.index(part) for part in ("7-1=", "six, before", "six, during", "six, after")]
    assert places == sorted(places)
    assert page.text.count("7-1=") == 1 and "Expected answer: 6" in page.text
    assert [a["class"] for _, a in page.tags if a.get("class") in ("right", "wrong")] == ["wrong", "wrong", "right"]


def test_long_and_many_completions_are_cut_but_keep_first_and_last(tmp_path):
    many = [sample("during", f"completion {i:03d}", step=i) for i in range(50)]
    long = sample("before", "begin" + "x" * 100_000 + "Answer: 6")
    run = make_run(tmp_path / "r", samples=[long, *many])
    html = write_report([run])[1].read_text(encoding="utf-8")
    text = Page(html).text
    assert "begin" in text and "Answer: 6" in text and "characters left out" in text and "x" * 10_000 not in text
    assert "completion 049" in text and text.count("completion 0") < 10


def test_two_runs_are_overlaid_and_their_differences_told(tmp_path):
    first = make_run(tmp_path / "first")
    second = make_run(tmp_path / "second", learning_rate=2e-4, **{"accuracy/train": 0.1})
    png, html = write_report([first, second], tmp_path / "both")
    assert png.parent == html.parent == tmp_path / "both"
    assert not (first / "report.png").exists()
    page = Page(html.read_text(encoding="utf-8"))
    heads = [text for text in page.texts if text in ("first", "second")]
    assert heads.count("first") == heads.count("second") >= 3
    differences = page.text[page.text.index("Settings that differ") : page.text.index("Sample completions")]
    assert "optimizer.learning_rate" in differences and "0.0001" in differences and "0.0002" in differences
    assert "run.seed" not in differences


def drawn_axes(runs, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    before = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), before(self, *a, **k))[1])
    draw_report(runs)
    return figures[0], {axes.get_title(loc="left"): axes for axes in figures[0].axes}


def test_the_panels_hold_the_curves_of_both_runs(tmp_path, monkeypatch):
    runs = read_runs([make_run(tmp_path / "first"), make_run(tmp_path / "second", **{"entropy/mean": 0.125})])
    figure, panels = drawn_axes(runs, monkeypatch)
    assert set(panels) == {
        *("Accuracy", "Reward", "Entropy", "Mean probability", "Response length", "Clip fractions", "Outcomes"),
        *("Time shares", "Gradient norm", "Mismatch", "Entropy change", "Covariance", "Entropy law"),
        *("Length spread", "Lengths of a step", "Rewards of a step"),
    }
    curves = [list(line.get_ydata()) for line in panels["Entropy"].lines]
    assert curves == [[pytest.approx(0.4 / step) for step in range(1, 7)], [0.125] * 6]
    assert len({line.get_color() for line in panels["Entropy"].lines}) == 2
    assert [list(line.get_xdata()) for line in panels["Accuracy"].lines][1] == [0.0, 6.0]  # validation points
    assert panels["Mismatch"].get_yscale() == "log" and panels["Entropy"].get_yscale() == "linear"
    assert math.isnan(panels["Gradient norm"].lines[0].get_ydata()[2])  # a gap, not a zero
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["first", "second"]


def test_time_shares_sum_to_one_also_when_parts_overlap(tmp_path):
    (run,) = read_runs([make_run(tmp_path / "r", **{"time/step": 4.0})])
    steps, shares = time_shares(run)
    assert steps == [1, 2, 3, 4, 5, 6]
    assert [shares[name][0] for name in ("rollout", "learn", "reshard", "other")] == [0.25, 0.5, 0.125, 0.125]
    (run,) = read_runs([make_run(tmp_path / "overlap", **{"time/step": 3.0, "time/reshard": None})])
    for place in range(6):
        parts = [share[place] for share in time_shares(run)[1].values()]
        assert sum(parts) == pytest.approx(1.0) and min(parts) >= 0.0


def test_supervised_stages_that_count_anew_are_joined(tmp_path):
    folder = make_run(tmp_path / "r")
    lines = MetricsFile(folder / "supervised.jsonl")
    for step in (1, 2, 3, 1, 2):
        lines.append({"supervised_step": step, "loss/supervised": 1.0})
    (run,) = read_runs([folder])
    assert run.supervised_loss() == ([1, 2, 3, 4, 5], [1.0] * 5)


def test_a_step_that_was_run_twice_counts_once_as_it_went_last(tmp_path):
    folder = make_run(tmp_path / "r", steps=2)
    MetricsFile(folder / "metrics.jsonl").append({"step": 1, "reward/mean": 9.0})
    (run,) = read_runs([folder])
    assert run.series("reward/mean") == ([1.0, 2.0], [9.0, 0.0])


@pytest.mark.parametrize(
    "lines", [[], [{"step": 0, "validation/accuracy": 0.3}], [{"step": 1, "entropy/mean": None}], [{"other": 1}]]
)
def test_a_run_that_has_hardly_begun_still_has_a_report(tmp_path, lines):
    metrics = MetricsFile(tmp_path / "r" / "metrics.jsonl")
    for line in lines:
        metrics.append(line)
    png, html = write_report([tmp_path / "r"])
    assert png_size(png.read_bytes()) == (1600, 3000)
    assert "Sample completions" in html.read_text(encoding="utf-8")


@pytest.mark.filterwarnings("error")
def test_long_curves_and_odd_names_draw_without_a_warning(tmp_path):
    odd = [make_run(tmp_path / name, steps=150) for name in ("_hidden", r"a$\no_formula$", "n" * 90)]
    draw_report(read_runs(odd))
    draw_report(read_runs(odd[1:2]))


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    runs = read_runs([make_run(tmp_path / "a" / "seed-1"), make_run(tmp_path / "b" / "seed-1")])
    assert [run.label for run in runs] == ["a/seed-1", "b/seed-1"]


def test_refusals_name_the_folder_and_what_would_do(tmp_path):
    make_run(tmp_path / "runs" / "tiny")
    with pytest.raises(RequestError, match=r"runs has no metrics\.jsonl; did you mean .*runs/tiny\?"):
        write_report([tmp_path / "runs"])
    with pytest.raises(RequestError, match="absent is not a folder"):
        write_report([tmp_path / "runs" / "tiny", tmp_path / "absent"])
    with pytest.raises(RequestError, match="at least one run"):
        write_report([])
    with pytest.raises(RequestError, match="is a file; name a folder"):
        write_report([tmp_path / "runs" / "tiny"], tmp_path / "runs" / "tiny" / "config.yaml")
    assert not (tmp_path / "runs" / "tiny" / "report.png").exists()


def test_the_entropy_law_is_drawn_and_told(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", steps=0)
    for step in range(1, 21):
        entropy = 1.0 - 0.04 * step
        accuracy = -0.5 * math.exp(entropy) + 1.5 + (0.1 if step > 8 else 0.0)
        MetricsFile(run / "metrics.jsonl").append({"step": step, "entropy/mean": entropy, "accuracy/train": accuracy})
    runs = read_runs([run])
    _, panels = drawn_axes(runs, monkeypatch)
    fitted, rest, early, late = panels["Entropy law"].get_lines()
    assert (len(fitted.get_xdata()), len(rest.get_xdata())) == (8, 12)
    assert [early.get_ydata()[0], late.get_ydata()[0]] == pytest.approx([1.0, 1.0])
    # 20 %: the rest holds 4 steps of the law and 12 that are 0.1 off
    words = [text.get_text() for text in panels["Entropy law"].get_legend().get_texts()]
    assert words == ["20%: ceiling 1.000, error on the rest 0.087", "40%: ceiling 1.000, error on the rest 0.100"]
    page = Page(render_page(runs, b"")).text
    assert "R = -0.5·exp(H) +1.5; ceiling 1.000, error on the rest 0.100" in page


def test_a_critic_has_panels_of_its_own(tmp_path, monkeypatch):
    values = {
        "critic/loss": 0.5,
        "critic/explained_variance": -40.0,
        "critic/value_mean": 1.0,
        "critic/return_mean": 2.0,
    }
    runs = read_runs([make_run(tmp_path / "ppo", **values), make_run(tmp_path / "dapo")])
    figure, panels = drawn_axes(runs, monkeypatch)
    assert figure.get_size_inches().tolist() == [16, 35]
    assert [list(line.get_ydata()) for line in panels["Values"].lines] == [[1.0] * 6, [2.0] * 6]
    assert [list(line.get_ydata()) for line in panels["Critic"].lines] == [[-40.0] * 6]
    assert [list(line.get_ydata()) for line in panels["Critic loss"].lines] == [[0.5] * 6]


def test_histograms_are_of_the_first_the_middle_and_the_last_step(tmp_path, monkeypatch):
    values = {"histogram/reward": histogram([-1.0, -1.0, 1.0]), "histogram/response_length": histogram([7, 7])}
    runs = read_runs([make_run(tmp_path / "run", **values)])
    _, panels = drawn_axes(runs, monkeypatch)
    outlines = panels["Rewards of a step"].patches
    assert len(outlines) == 3
    shares, edges, _ = outlines[0].get_data()
    assert (shares[0], shares[-1], edges[0], edges[-1]) == (pytest.approx(2 / 3), pytest.approx(1 / 3), -1, 1)
    words = [text.get_text() for text in panels["Rewards of a step"].get_legend().get_texts()]
    assert words == ["step 1", "step 4", "step 6"]
    assert {line.get_xdata()[0] for line in panels["Lengths of a step"].lines} == {7}  # all are equal


@pytest.mark.parametrize("broken", [3, {}, {"low": 0, "high": 1, "counts": ["x"]}, {"low": 0, "high": 1, "counts": []}])
def test_what_is_no_histogram_is_not_drawn(tmp_path, broken):
    write_report([make_run(tmp_path / "run", **{"histogram/reward": broken})])


def test_a_histogram_counts_every_value():
    assert histogram([3, 3, 3]) == {"low": 3.0, "high": 3.0, "counts": [3] + [0] * 19}
    found = histogram(range(40))
    assert (found["low"], found["high"], found["counts"]) == (0.0, 39.0, [2] * 20)


def test_a_sample_shows_its_reward_and_verdict(tmp_path):
    run = make_run(tmp_path / "run", samples=[{**sample("after", "7-1=6", right=True), "reward": 0.5}])
    page = Page(write_report([run])[1].read_text(encoding="utf-8")).text
    assert "After training, step 0: right, reward +0.5" in page
