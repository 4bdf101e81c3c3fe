"""Prompts as a recipe asks for them: repeats, templates, columns of the validation file, overlap."""

import json
from pathlib import Path

import pytest
import yaml

from dapo_megatron.config import Recipe
from dapo_megatron.config.load import build_recipe
from dapo_megatron.data.arithmetic import build_tokenizer
from dapo_megatron.errors import RequestError
from dapo_megatron.prepare import check_request
from dapo_megatron.prompt_files import load_prompts
from tests.command_line import RECIPE
from tests.tiny_models import write_model

ROWS = [("1+1=", "2"), ("2+2=", "4"), ("1+1= ", "02"), ("2+2=", "5"), ("3+3=", "6")]


def write(path: Path, rows, columns=("prompt", "answer")) -> Path:
    path.write_text("".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(tmp_path: Path):
    """A function overrides → recipe on the files train.jsonl and validation.jsonl."""
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "validation.jsonl", [("4+4=", "#8")], ("question", "truth"))
    build_tokenizer(tmp_path / "model")
    write_model(tmp_path / "model", "qwen2", tied=True)
    config = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))

    def build(*overrides: str) -> Recipe:
        return build_recipe(
            config,
            (
                f"run.directory={tmp_path / 'run'}",
                "model.scratch=null",
                f"model.path={tmp_path / 'model'}",
                "data.generate=null",
                "supervised.stages=[]",
                f"data.train={tmp_path / 'train.jsonl'}",
                f"data.validation={tmp_path / 'validation.jsonl'}",
                "data.validation_prompt_column=question",
                "data.validation_answer_column=truth",
                *overrides,
            ),
        )

    return build


def kept(recipe: Recipe) -> tuple[list[int], list[str]]:
    prompts, lines = load_prompts(recipe, Path(recipe.data.train))
    return [prompt.id for prompt in prompts], [line.split(": ", 1)[1] for line in lines]


def test_repeats_are_reported_and_kept(recipe):
    ids, lines = kept(recipe())
    assert ids == [0, 1, 2, 3, 4]
    assert lines == [
        "2 of 5 prompts repeat an earlier question: rows 0, 2; rows 1, 3",
        "1 questions have conflicting answers: rows 1, 3 say 4, 5",
        "all prompts are kept; data.drop_duplicates and data.drop_conflicts would drop such rows",
    ]


@pytest.mark.parametrize(
    ("settings", "ids", "told"),
    [
        (["data.drop_duplicates=true"], [0, 1, 3, 4], "1 prompts dropped (1 for duplicate), 4 kept"),
        (["data.drop_conflicts=true"], [0, 2, 4], "2 prompts dropped (2 for conflict), 3 kept"),
        (
            ["data.drop_conflicts=true", "data.drop_duplicates=true"],
            [0, 4],
            "3 prompts dropped (2 for conflict, 1 for duplicate), 2 kept",
        ),
    ],
)
def test_repeats_are_dropped(recipe, settings: list[str], ids: list[int], told: str):
    found, lines = kept(recipe(*settings))
    assert (found, lines[-1]) == (ids, told)


def test_nothing_left_after_dropping(recipe, tmp_path: Path):
    write(tmp_path / "train.jsonl", [("a", "1"), ("a", "2")])
    with pytest.raises(RequestError, match=r"data.drop_conflicts=true leaves no prompt"):
        kept(recipe("data.drop_conflicts=true"))


def test_the_validation_file_has_its_own_columns(recipe):
    settings = recipe("data.answer_after='+'", "data.validation_answer_after='#'")
    (prompt,), lines = load_prompts(settings, Path(settings.data.validation), "validation")
    assert (prompt.text, prompt.answer, lines) == ("4+4=", "8", [])
    settings = recipe("data.answer_after='+'", "data.validation_answer_after=''")
    assert load_prompts(settings, Path(settings.data.validation), "validation")[0][0].answer == "#8"


def test_both_sides_wear_the_template(recipe):
    settings = recipe("data.prompt_template='1+{prompt}'", "data.drop_duplicates=true")
    assert load_prompts(settings, Path(settings.data.train))[0][0].text == "1+1+1="
    assert load_prompts(settings, Path(settings.data.validation), "validation")[0][0].text == "1+4+4="


def test_a_sound_request_passes(recipe):
    check_request(recipe())


@pytest.mark.parametrize(
    ("question", "overrides"), [("3+3=", []), (" 3+3=", []), (" 3+3=", ["data.prompt_template='1+{prompt}'"])]
)
def test_overlap_is_refused_before_launch(recipe, tmp_path: Path, question: str, overrides: list[str]):
    write(tmp_path / "validation.jsonl", [("4+4=", "8"), (question, "6")], ("question", "truth"))
    told = r"overlaps data.train=.*: 1 training prompts .*first row 4 = validation row 1.*data.allow_overlap=true"
    with pytest.raises(RequestError, match=told):
        check_request(recipe(*overrides))
    check_request(recipe(*overrides, "data.allow_overlap=true"))


def test_an_answer_that_is_no_integer_is_refused_before_launch(recipe, tmp_path: Path):
    write(tmp_path / "train.jsonl", [("1+1=", "2"), ("2+2=", "4/1")])
    check_request(recipe())
    with pytest.raises(RequestError, match=r"train.jsonl, line 2, column answer: .*'4/1' is not an integer"):
        check_request(recipe("data.integer_answers=true"))


def test_lengths_name_the_row_of_the_file_after_dropping(recipe, tmp_path: Path):
    write(tmp_path / "train.jsonl", [("1=", "2"), ("1=", "2"), ("1+1+1+1+1+1+1+1+1=", "9")])
    with pytest.raises(RequestError, match=r"train.jsonl, row 2 \(from 0\): the prompt has 18 tokens"):
        check_request(recipe("data.drop_duplicates=true"))


def test_a_template_with_a_generated_task_is_refused(recipe):
    settings = recipe("data.generate={}", "data.train=null", "data.validation=null", "data.prompt_template=dapo-math")
    with pytest.raises(RequestError, match=r"data.prompt_template='dapo-math' does not go with data.generate"):
        check_request(settings)
