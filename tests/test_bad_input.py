"""Every wrong request: one clear message, exit code 2, no rank started, nothing written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command_line import RECIPE, run_command
from tests.tiny_models import write_model


def refused(tmp_path, *arguments, says: tuple[str, ...]):
    """Run a request in which run.directory is tmp_path/run; it must be refused and leave no trace."""
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    result = run_command(*arguments)
    assert result.returncode == 2, result.stdout + result.stderr
    for part in says:
        assert part in result.stderr, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    return result.stderr


@pytest.fixture
def recipe(tmp_path):
    """Arguments of a request that would be accepted."""
    return ("train", RECIPE, f"run.directory={tmp_path / 'run'}")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("parallel.tensro=2", ("parallel.tensro", "parallel.tensor")),
        ("optimizer.learning_rate=fast", ("optimizer.learning_rate", "fast")),
        ("run.steps=-1", ("run.steps", "-1")),
        ("rollout.top_p=0.9", ("rollout.top_p=0.9", "use 1.0")),
        ("rollout.samples_per_prompt=1", ("rollout.samples_per_prompt=1", "use 2 or more")),
        ("parallel.tensor=3", ("parallel.tensor=3", "4 attention heads", "use 1, 2 or 4")),
        ("parallel.pipeline=3", ("parallel.pipeline=3", "4 layers", "use 2 or 4")),
        ("parallel.world=6", ("parallel.world=6", "4 = ", "use 4 or 8")),
        ("rollout.max_response_length=4000", ("rollout.max_response_length=4000", "128 positions")),
        ("algorithm.mini_batch_prompts=5", ("algorithm.mini_batch_prompts=5", "use 4 or 8")),
        ("data.generate.train_prompts=100000000", ("data.generate.train_prompts", "use at most")),
        ("run.steps", ("key.sub=value",)),
    ],
)
def test_a_wrong_setting(recipe, tmp_path, override, says):
    refused(tmp_path, *recipe, override, says=says)


def test_all_sizes_that_do_not_divide_are_told_together(tmp_path, recipe):
    told = refused(
        tmp_path,
        *recipe,
        "parallel.tensor=3",
        "parallel.pipeline=3",
        "model.scratch.ffn=385",
        says=("attention heads", "key/value heads", "ffn size 385", "4 layers"),
    )
    assert len(told.strip().splitlines()) >= 4


def test_a_missing_recipe(tmp_path):
    refused(tmp_path, "train", tmp_path / "none.yaml", says=("none.yaml",))


def test_broken_yaml_names_its_line(tmp_path):
    (tmp_path / "broken.yaml").write_text("run:\n  directory: [x\nmodel: {}\n")
    refused(tmp_path, "train", tmp_path / "broken.yaml", says=("broken.yaml", "line 3"))


def test_a_directory_that_is_not_a_run_is_never_cleared(tmp_path, recipe):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    refused(tmp_path, *recipe, "--overwrite", says=("run.directory", "not a run"))


def test_a_directory_with_a_run_needs_a_word(tmp_path, recipe):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("{}")
    refused(tmp_path, *recipe, says=("already holds a run", "--resume", "--overwrite"))


@pytest.fixture
def old_run(tmp_path):
    """A directory that looks like a run, and must still look so afterwards."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("days of work")
    recipe = RECIPE.read_text().replace("runs/tiny-arithmetic", str(tmp_path / "run"))
    (tmp_path / "run" / "config.yaml").write_text(recipe)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("data.generate.train_prompts=100000000", ("data.generate.train_prompts",)),
        ("data.generate.train_prompts=125", ("data.generate.train_prompts", "distinct")),
        ("data.max_prompt_length=6", ("data.max_prompt_length=6", "12")),
        ("learner.tokens_per_micro_batch=40", ("learner.tokens_per_micro_batch=40",)),
    ],
)
def test_a_refused_overwrite_leaves_the_old_run(recipe, tmp_path, old_run, override, says):
    # of 126 questions with two operands, some belong to validation: found out only while generating
    extra = ("data.generate.terms=[2]", "data.generate.validation_prompts=1") if override.endswith("125") else ()
    refused(tmp_path, *recipe, override, *extra, "--overwrite", says=says)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "days of work"


@pytest.mark.parametrize("override", ["model.scratch.hidden=64", "data.generate.terms=[7]", "run.seed=5"])
def test_resuming_something_else(recipe, tmp_path, old_run, override):
    refused(tmp_path, *recipe, override, "--resume", says=(override.split(".")[0], "differs", "config.yaml"))


def test_going_on_and_starting_anew_at_once(recipe, tmp_path, old_run):
    refused(tmp_path, *recipe, "--resume", "--overwrite", says=("exclude each other",))


def test_the_two_debug_halves_at_once(recipe, tmp_path):
    refused(tmp_path, *recipe, "--debug-rollout-only", "--debug-train-only", tmp_path, says=("exclude each other",))


def test_a_run_directory_that_is_a_file(recipe, tmp_path):
    (tmp_path / "run").write_text("not a folder")
    refused(tmp_path, *recipe, says=("run.directory", "not a directory"))


@pytest.fixture
def own_model(tmp_path):
    """A request with a model folder, a tokenizer and data of the user's own."""
    from dapo_megatron.data.arithmetic import build_tokenizer

    model = write_model(tmp_path / "model", "qwen2", tied=False)
    build_tokenizer(model)
    for name, other in (("train", 1), ("validation", 4)):
        rows = [{"prompt": f"{i}+{other}=", "answer": str(i + other)} for i in (2, 3)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (
        "train", RECIPE, f"run.directory={tmp_path / 'run'}", "model.scratch=null", f"model.path={model}",
        "data.generate=null", "supervised.stages=[]", f"data.train={tmp_path / 'train.jsonl'}",
        f"data.validation={tmp_path / 'validation.jsonl'}",
    )  # fmt: skip


def change_weights(tmp_path, change):
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_a_missing_tensor(tmp_path, own_model):
    change_weights(tmp_path, lambda weights: weights.pop("model.layers.2.mlp.up_proj.weight"))
    refused(tmp_path, *own_model, says=("lacks model.layers.2.mlp.up_proj.weight",))


def test_an_extra_tensor(tmp_path, own_model):
    change_weights(tmp_path, lambda weights: weights.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(1)}))
    refused(tmp_path, *own_model, says=("model.layers.9.mlp.up_proj.weight", "unknown"))


def test_a_wrong_shape(tmp_path, own_model):
    change_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": torch.zeros(100, 60)}))
    refused(tmp_path, *own_model, says=("lm_head.weight", "(100, 60)", "(100, 64)"))


def test_a_truncated_file(tmp_path, own_model):
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(tmp_path, *own_model, says=("model.safetensors", "cut short"))


def test_a_missing_model(tmp_path, own_model):
    refused(tmp_path, *own_model, f"model.path={tmp_path / 'nowhere'}", says=("nowhere",))


def test_a_vocabulary_that_does_not_fit(tmp_path, own_model):
    path = tmp_path / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 500, "content": "<far>"})
    path.write_text(json.dumps(tokenizer))
    refused(tmp_path, *own_model, says=("500", "100 vocabulary rows", "at least 501"))


def test_an_empty_data_set(tmp_path, own_model):
    (tmp_path / "train.jsonl").write_text("")
    refused(tmp_path, *own_model, says=("train.jsonl", "empty"))


def test_a_missing_data_file(tmp_path, own_model):
    (tmp_path / "validation.jsonl").unlink()
    refused(tmp_path, *own_model, says=("validation.jsonl",))


def test_a_row_without_an_answer(tmp_path, own_model):
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+2=", "answer": "3"}\n{"prompt": "2+2="}\n')
    refused(tmp_path, *own_model, says=("train.jsonl", "line 2", "answer"))


def test_answers_that_are_no_test_cases(tmp_path, own_model):
    refused(
        tmp_path, *own_model, "reward.grader=code", says=("train.jsonl row 0", "reward.grader=code", "the answer is")
    )


def test_a_reward_model_that_is_none(tmp_path, own_model):
    model = f"reward.model.path={tmp_path / 'model'}"
    says = ("is no sequence classifier", "Qwen2ForCausalLM", "ForSequenceClassification")
    refused(tmp_path, *own_model, "reward.grader=model", model, says=says)


def test_a_judge_that_is_none(tmp_path, own_model):
    judge = ("reward.grader=judge", f"reward.judge.model={tmp_path / 'model'}")
    refused(tmp_path, *own_model, *judge, says=("chat template", "reward.judge.chat_template=false"))
    says = ("reward.judge.model", "no tokens that tell YES from NO")
    refused(tmp_path, *own_model, *judge, "reward.judge.chat_template=false", says=says)


def test_a_prompt_longer_than_the_limit(tmp_path, own_model):
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "1+" * 20 + "1=", "answer": "21"}) + "\n")
    refused(tmp_path, *own_model, says=("train.jsonl", "data.max_prompt_length=16", "42"))


def test_overwriting_what_the_request_reads(tmp_path, own_model):
    (tmp_path / "config.yaml").write_text("{}")
    arguments = [f"run.directory={tmp_path}" if "run.directory" in str(a) else a for a in own_model]
    refused(tmp_path, *arguments, "--overwrite", says=("--overwrite would delete", "which this request reads"))


def test_a_supervised_example_longer_than_a_micro_batch(tmp_path, own_model):
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "1+1=", "response": "1" * 3000}) + "\n")
    stage = (
        f"supervised.stages=[{{data: {tmp_path / 'long.jsonl'}, steps: 1, batch_sequences: 1, learning_rate: 1.0e-3}}]"
    )
    refused(tmp_path, *own_model, stage, says=("learner.tokens_per_micro_batch=2048", "3005"))


def test_a_model_from_scratch_without_its_task(tmp_path, recipe):
    refused(
        tmp_path,
        *recipe,
        "data.generate=null",
        "supervised.stages=[]",
        f"data.train={tmp_path / 'x.jsonl'}",
        f"data.validation={tmp_path / 'x.jsonl'}",
        says=("model.scratch", "data.generate"),
    )


def test_an_uninstalled_tracker(tmp_path, recipe):
    refused(tmp_path, *recipe, "monitoring.mlflow=true", says=("monitoring.mlflow=true", "not installed"))


def test_debug_files_that_are_not_there(tmp_path, recipe):
    refused(tmp_path, *recipe, "--debug-train-only", tmp_path / "none", says=("none", "no rollout file"))


@pytest.mark.parametrize("direction", ["hf-to-megatron", "megatron-to-hf"])
def test_convert_refuses(tmp_path, direction):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "something").write_text("x")
    refused(tmp_path, "convert", direction, tmp_path / "source", tmp_path / "out", says=(str(tmp_path / "source"),))


def test_convert_refuses_a_destination_that_exists(tmp_path):
    model = write_model(tmp_path / "model", "qwen2", tied=False)
    (tmp_path / "out").mkdir()
    refused(tmp_path, "convert", "hf-to-megatron", model, tmp_path / "out", says=("exists",))


def test_convert_refuses_sizes_that_do_not_divide(tmp_path):
    model = write_model(tmp_path / "model", "qwen2", tied=False)
    refused(
        tmp_path, "convert", "hf-to-megatron", model, tmp_path / "out", "parallel.tensor=3", says=("attention heads",)
    )


def test_a_stage_of_ones_own_beside_a_generated_task(tmp_path, recipe):
    stage = "supervised.stages=[{{data: {}, steps: 1, batch_sequences: 1, learning_rate: 1.0e-3}}]"
    refused(
        tmp_path,
        *recipe,
        stage.format("nowhere.jsonl"),
        says=("supervised.stages[0].data=nowhere.jsonl: no such file",),
    )
    (tmp_path / "rows.jsonl").write_text('{"question": "1+1=", "response": "Answer: 2"}\n')
    refused(tmp_path, *recipe, stage.format(tmp_path / "rows.jsonl"), says=("no column prompt; the row has",))
