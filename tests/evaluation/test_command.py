"""`dapo-megatron evaluate` on tiny random models: real engine, real grader, no ranks."""

import json
import re

import pytest

from dapo_megatron.config.load import build_recipe, dump_recipe
from dapo_megatron.config.model import Scratch
from dapo_megatron.conversion.command import convert
from dapo_megatron.errors import RequestError
from dapo_megatron.evaluate_command import (
    as_json,
    check_output,
    evaluate_model,
    evaluation_recipe,
    find_model,
    print_scores,
)
from dapo_megatron.scratch import build_scratch_model
from tests.command_line import ROOT, run_command

SHARED = ROOT.parent / "shared" / "data"
KEYS = {"avg_at_k", "pass_at_k", "maj_at_k", "standard_error", "problems"}
SHAPE = Scratch(hidden=32, layers=2, heads=2, kv_heads=1, head_dim=16, ffn=48, max_positions=64, init_std=0.3)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """model/ (a Hugging Face folder), run/ (a run with one checkpoint of the same weights), problems.jsonl."""
    place = tmp_path_factory.mktemp("evaluate")
    build_scratch_model(place / "model", SHAPE, seed=3)
    convert("hf-to-megatron", place / "model", place / "run" / "checkpoints" / "step-000007")
    run = {"run": {"directory": str(place / "run"), "steps": 9}, "model": {"path": str(place / "model")}}
    kept = {"data": {"prompt_column": "q", "answer_column": "a"}, "rollout": {"max_response_length": 5}}
    (place / "run" / "config.yaml").write_text(dump_recipe(build_recipe(run | kept)))
    rows = [{"q": f"{i}+1=", "a": str(i + 1)} for i in range(6)]
    (place / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def settings(place, samples=4, max_tokens: int | None = 5, seed=0, **changes):
    return {
        "data": {
            "validation": str(place / "problems.jsonl"),
            "validation_prompt_column": "q",
            "validation_answer_column": "a",
        },
        "rollout": {"max_response_length": max_tokens},
        "evaluation": {"samples": samples, "seed": seed, **changes},
    }


def test_a_checkpoint_answers_as_its_hugging_face_folder(place, capsys):
    folder = evaluate_model(place / "model", settings(place))
    # columns and the longest response are the run's
    bare = {"data": {"validation": str(place / "problems.jsonl")}, "evaluation": {"samples": 4}}
    run = evaluate_model(place / "run", bare)
    assert run.model == place / "run" / "checkpoints" / "step-000007"
    assert run.problems == folder.problems and run.scores == folder.scores
    assert capsys.readouterr().out == ""  # standard output is for the result
    other = evaluate_model(place / "model", settings(place, seed=1))
    assert other.problems != folder.problems
    result = json.loads(json.dumps(as_json(folder), allow_nan=False))
    assert set(result) >= KEYS
    assert (result["problems"], result["samples"], result["max_tokens"]) == (6, 4, 5)
    assert all(len(problem["responses"]) == 4 for problem in folder.problems)
    assert all(1 <= r["tokens"] <= 5 for problem in folder.problems for r in problem["responses"])
    first = evaluate_model(place / "model", settings(place, max_prompts=1))
    assert first.problems == folder.problems[:1]
    assert as_json(first)["standard_error"] is None


def test_programs_have_no_majority(place, tmp_path, capsys):
    answers = ('{"inputs": ["1 2"], "outputs": ["3"]}', "42")
    data = tmp_path / "programs.jsonl"
    data.write_text(json.dumps({"q": "1+2=", "a": answers[0]}) + "\n")
    asked = settings(place, samples=2) | {"reward": {"grader": "code"}}
    asked["data"]["validation"] = str(data)
    found = evaluate_model(place / "model", asked)
    result = json.loads(json.dumps(as_json(found), allow_nan=False))
    assert (result["maj_at_k"], result["avg_at_k"], result["grader_failures"]) == (None, 0.0, 0)
    print_scores(found)
    assert re.search(r"^maj@2 +none: ", capsys.readouterr().out, re.MULTILINE)
    data.write_text(json.dumps({"q": "1+2=", "a": answers[1]}) + "\n")
    with pytest.raises(
        RequestError, match=r"programs\.jsonl row 0 \(from 0\): with reward\.grader=code the answer is "
    ):
        evaluate_model(place / "model", asked)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"max_tokens": 100}, "--max-tokens 100 after the longest prompt of 4 tokens exceeds the model's 64 positions"),
        ({"samples": 0}, "evaluation.samples"),
        ({"temperature": 0.0}, "use --samples 1"),
        ({"top_p": 1.5}, "evaluation.top_p"),
        ({"fork_temperature": 1.2}, "--fork-temperature=1.2 needs --entropy-threshold"),
        ({"entropy_threshold": 0.5}, "--entropy-threshold=0.5 would not act without --fork-temperature"),
        ({"entropy_threshold": -1.0, "fork_temperature": 1.2}, "evaluation.entropy_threshold"),
        ({"temperature": 0.0, "entropy_threshold": 0.5, "fork_temperature": 0.0}, "use --samples 1"),
    ],
)
def test_what_cannot_work_is_refused(place, changes, said):
    with pytest.raises(RequestError, match=said):
        evaluate_model(place / "model", settings(place, **changes))


def test_greedy_decoding_takes_one_sample(place):
    assert evaluate_model(place / "model", settings(place, samples=1, temperature=0.0)).scores.samples == 1


def test_a_second_temperature_for_forking_tokens(place, capsys):
    """Above no threshold at all it is the only one; vLLM has no such thing."""
    hot = {"samples": 2, "temperature": 0.5, "fork_temperature": 1.5}
    found = evaluate_model(place / "model", settings(place, entropy_threshold=0.0, **hot))
    assert found.problems == evaluate_model(place / "model", settings(place, samples=2, temperature=1.5)).problems
    half = evaluate_model(place / "model", settings(place, entropy_threshold=2.0, **hot))
    assert half.problems != found.problems
    assert (as_json(half)["fork_temperature"], as_json(half)["entropy_threshold"]) == (1.5, 2.0)
    print_scores(half)
    assert "temperature 0.5 (1.5 above 2 nats of entropy), top-p" in capsys.readouterr().out
    asked = settings(place, entropy_threshold=2.0, **hot) | {"rollout": {"engine": "vllm"}}
    with pytest.raises(RequestError, match=r"--fork-temperature=1\.5 does not go with engine vllm, .*; use hf"):
        evaluate_model(place / "model", asked)


def test_a_damaged_checkpoint_is_refused_or_passed_over(place, tmp_path):
    run = tmp_path / "run"
    convert("hf-to-megatron", place / "model", run / "checkpoints" / "step-000001")
    convert("hf-to-megatron", place / "model", run / "checkpoints" / "step-000002")
    (run / "config.yaml").write_text((place / "run" / "config.yaml").read_text())
    shard = next((run / "checkpoints" / "step-000002" / "shards").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    found, owner, lines = find_model(run)
    assert found.name == "step-000001" and owner == run
    assert "skipped a damaged checkpoint" in lines[0]
    with pytest.raises(RequestError, match="has changed since"):
        evaluate_model(run / "checkpoints" / "step-000002", settings(place))
    (run / "checkpoints" / "step-000001" / "state.json").unlink()
    with pytest.raises(RequestError, match="without a sound checkpoint"):
        find_model(run)


def test_what_names_no_model_is_refused(tmp_path):
    with pytest.raises(RequestError, match="is not a folder"):
        find_model(tmp_path / "nowhere")
    with pytest.raises(RequestError, match=r"neither config\.json"):
        find_model(tmp_path)


def test_overrides_come_last(tmp_path):
    recipe = evaluation_recipe(tmp_path, None, {"evaluation": {"samples": 8, "top_p": None}}, ["evaluation.seed=4"])
    assert (recipe.evaluation.samples, recipe.evaluation.top_p, recipe.evaluation.seed) == (8, 0.7, 4)


def test_an_output_that_would_hurt_is_refused(place, tmp_path):
    data = place / "problems.jsonl"
    for output, said in ((data, "is the data file"), (tmp_path, "is a folder"), (tmp_path / "a" / "b", "no folder")):
        with pytest.raises(RequestError, match=said):
            check_output(output, data)


def test_the_command_refuses_no_samples(place):
    result = run_command("evaluate", "--model", place / "model", "--data", place / "problems.jsonl", "--samples", 0)
    assert result.returncode == 2
    assert result.stderr == "dapo-megatron: --samples 0 must be positive; use at least 1\n"


@pytest.mark.slow
def test_vllm_and_the_embedded_engine_agree(tmp_path, place):
    """Greedy responses of both engines; vLLM loads the folder by itself."""
    pytest.importorskip("vllm")
    shape = SHAPE.model_copy(update={"hidden": 64, "head_dim": 32})
    build_scratch_model(tmp_path / "m", shape, seed=3)
    data = settings(place, samples=1, temperature=0.0)
    texts = []
    for engine in ("hf", "vllm"):
        asked = data | {"rollout": {"max_response_length": 5, "engine": engine}}
        found = evaluate_model(tmp_path / "m", asked)
        texts.append([r["text"] for p in found.problems for r in p["responses"]])
    assert texts[0] == texts[1]
    assert len(texts[0]) == 6
