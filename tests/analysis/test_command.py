"""`dapo-megatron analyze entropy` on tiny random models: real engine, real scoring, no ranks."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from dapo_megatron.analyze_command import (
    EntropyRequest,
    analyze_entropy,
    check_entropy_request,
    print_report,
    shown_token,
)
from dapo_megatron.cli import app
from dapo_megatron.config.load import build_recipe, dump_recipe
from dapo_megatron.conversion.command import convert
from dapo_megatron.data.tokenizer import load_tokenizer
from dapo_megatron.errors import RequestError
from dapo_megatron.evaluate_command import evaluate_model
from tests.analysis.models import write_tiny


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """model/ and base/ (Hugging Face folders), run/ (a run with one checkpoint of model/), data/prompts.jsonl."""
    place = tmp_path_factory.mktemp("analyze")
    write_tiny(place / "base", seed=4)
    write_tiny(place / "model", seed=3)
    convert("hf-to-megatron", place / "model", place / "run" / "checkpoints" / "step-000007")
    prompts = place / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{i}+1=", "answer": str(i + 1)}) + "\n" for i in range(6)))
    run = {
        "run": {"directory": str(place / "run"), "steps": 0},
        "model": {"path": str(place / "model")},
        "data": {"validation": str(prompts)},
        "rollout": {"max_response_length": 6},
    }
    (place / "run" / "config.yaml").write_text(dump_recipe(build_recipe(run)))
    return place


SAMPLING = {"evaluation": {"samples": 3, "temperature": 1.0, "top_p": 1.0}, "rollout": {"max_response_length": 6}}


@pytest.fixture(scope="module")
def sampled(place):
    request = EntropyRequest(place / "run", base=place / "base", least_count=2, settings=SAMPLING)
    return analyze_entropy(request)


def test_a_run_is_sampled_on_its_own_validation_prompts(place, sampled):
    settings = SAMPLING | {"data": {"validation": str(place / "prompts.jsonl")}}
    evaluated = evaluate_model(place / "model", settings)
    tokens = [response["tokens"] for problem in evaluated.problems for response in problem["responses"]]
    assert (sampled["responses"], sampled["tokens"]) == (len(tokens), sum(tokens))  # the same samples
    assert sampled["model"] == str(place / "run" / "checkpoints" / "step-000007")
    assert sampled["base"]["tokens"] == sampled["tokens"]
    assert 0 < sampled["base"]["overlap"]["share"] < 1
    json.dumps(sampled, allow_nan=False)


def test_recorded_text_beside_the_model_itself_has_not_changed(place, tmp_path):
    text = tmp_path / "recorded.jsonl"
    text.write_text("".join(json.dumps({"prompt": f"{i}+1=", "responses": ["12;", f"{i}"]}) + "\n" for i in range(6)))
    request = EntropyRequest(place / "run", base=place / "model", text=text, least_count=1)
    found = analyze_entropy(request)
    tokenizer = load_tokenizer(place / "model")
    drawn = [t for i in range(6) for part in ("12;", f"{i}") for t in tokenizer.encode(part, add_special_tokens=False)]
    assert (found["tokens"], found["responses"]) == (len(drawn), 12)
    assert {t["text"] for t in found["forking"]} == {tokenizer.decode([t]) for t in drawn}
    base = found["base"]
    assert base["overlap"]["share"] == 1.0 and base["percentiles"] == found["percentiles"]
    assert [row["mean_change"] for row in base["change"]] == [0.0] * 20
    assert analyze_entropy(replace(request, base=None, limit=2))["responses"] == 4


def test_what_is_printed_cannot_steer_the_terminal(sampled, capsys):
    hostile = {"id": 1, "text": "[red]\x1b[2J\n\u202e", "count": 3, "mean": 0.5}
    print_report(sampled | {"forking": [hostile], "model": "a\x1b[2Jb"})
    told = capsys.readouterr().out
    assert "'[red]\\x1b[2J\\n\\u202e'" in told and "a\\x1b[2Jb" in told
    assert "\x1b" not in told and "\u202e" not in told
    assert f"({sampled['base']['overlap']['share']:.1%})" in told and "base percentiles" in told
    assert shown_token("\t") == "'\\t'"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ratio": 0.0}, r"--ratio 0 must be more than 0 and at most 1; use 0\.2"),
        ({"ratio": 1.5}, r"--ratio 1\.5"),
        ({"bins": 0}, "--bins 0 must be positive"),
        ({"limit": 0}, "--limit 0 must be positive"),
        ({"both": True}, "--text and --data exclude each other"),
        ({"output": "."}, r"--output .* is a folder; name a \.json file"),
        ({"plot": "no/where.png"}, "--plot .*: there is no folder"),
        ({"output": "prompts.jsonl"}, "is the data file"),
    ],
)
def test_requests_that_cannot_work(place, changes, said):
    changes = dict(changes)
    files = {name: place / changes.pop(name) if name in changes else None for name in ("output", "plot")}
    data = place / "prompts.jsonl"
    both = {"text": data} if changes.pop("both", False) else {}
    with pytest.raises(RequestError, match=said):
        check_entropy_request(EntropyRequest(place / "model", data=data, **both, **changes), **files)


def test_models_and_texts_that_do_not_fit(place, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text('{"prompt": "1+1=", "response": "2"}\n')
    asked = EntropyRequest(place / "model", text=text)
    other = write_tiny(tmp_path / "other", seed=1)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "1+1=", "response": "1+" * 40}) + "\n")
    for request, said in (
        (replace(asked, base=other), "its vocabulary of .* tokens 2 are another or missing there"),
        (replace(asked, base=tmp_path / "nowhere"), "--base .*nowhere is not a folder"),
        (replace(asked, model=tmp_path / "nowhere"), "MODEL .*nowhere is not a folder"),
        (replace(asked, text=tmp_path / "none.jsonl"), "no such file"),
        (replace(asked, text=None), "is no run: give --data PROMPTS to sample for, or --text RESPONSES"),
        (replace(asked, text=long), "has 64 positions and the longest text 8[0-9] tokens"),
    ):
        with pytest.raises(RequestError, match=said):
            analyze_entropy(request)


def test_the_command_writes_what_it_prints(place, tmp_path):
    asked = ["analyze", "entropy", str(place / "run"), "--base", str(place / "base"), "--samples", "2", "--json"]
    files = ["--min-count", "1", "--output", str(tmp_path / "e.json"), "--plot", str(tmp_path / "e.png")]
    result = CliRunner().invoke(app, [*asked, *files])
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed == json.loads((tmp_path / "e.json").read_text())
    assert printed["responses"] == 12 and printed["forking"] and np.isfinite(printed["mean"])
    assert (tmp_path / "e.png").stat().st_size > 10_000
    refused = CliRunner().invoke(app, ["analyze", "entropy", str(tmp_path)])
    assert isinstance(refused.exception, RequestError) and "has neither config.json" in str(refused.exception)
