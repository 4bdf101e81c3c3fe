import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dapo_megatron.data.arithmetic import build_tokenizer
from dapo_megatron.data.prompts import (
    Message,
    Prompt,
    check_prompt_lengths,
    encode_prompt,
    read_prompts,
    read_supervised,
)
from dapo_megatron.data.tokenizer import load_tokenizer
from dapo_megatron.errors import RequestError

DATA = Path(__file__).parents[3] / "shared" / "data"
COLUMNS = {"prompt_column": "prompt", "answer_column": "answer"}
TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(params=[".jsonl", ".parquet"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return tmp_path / f"data{request.param}"


def test_text_prompts(file: Path):
    write(file, [{"prompt": "1+1=", "answer": "2", "other": 1}, {"prompt": "数=", "answer": " 3 ", "other": 2}])
    assert read_prompts(file, **COLUMNS) == [Prompt(0, "1+1=", "2"), Prompt(1, "数=", "3")]


def test_conversations_and_nested_columns(file: Path):
    write(file, [{"prompt": TURNS, "reward_model": {"style": "rule", "ground_truth": "2"}}])
    (prompt,) = read_prompts(file, prompt_column="prompt", answer_column="reward_model.ground_truth")
    assert prompt.messages == (Message("system", "Be brief."), Message("user", "1+1?"))
    assert prompt.text == "Be brief.\n\n1+1?"
    assert prompt.answer == "2"


def test_a_column_whose_own_name_has_a_dot(file: Path):
    write(file, [{"prompt": "a", "reward.answer": "2"}])
    assert read_prompts(file, prompt_column="prompt", answer_column="reward.answer")[0].answer == "2"


@pytest.mark.parametrize(("value", "answer"), [(142.0, "142"), (0.5, "0.5"), (-7, "-7")])
def test_answers_may_be_numbers(file: Path, value: float, answer: str):
    write(file, [{"prompt": "a", "answer": value}])
    assert read_prompts(file, **COLUMNS)[0].answer == answer


def test_blank_lines_are_skipped_and_rows_stay_numbered(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_text('\n{"prompt": "a", "answer": "1"}\n\n{"prompt": "b", "answer": "2"}\n\n')
    assert [(prompt.id, prompt.text) for prompt in read_prompts(path, **COLUMNS)] == [(0, "a"), (1, "b")]


GOOD = {"prompt": "a", "answer": "1"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "answer": None}, "column answer: no answer"),
        ({"prompt": "a", "answer": "  "}, "column answer: no answer"),
        ({"prompt": "a", "answer": [1]}, r"column answer: must be text or a number, not list \[1\]"),
        ({"prompt": "a", "answer": True}, "column answer: must be text or a number, not bool True"),
        ({"prompt": 3, "answer": "1"}, "column prompt: must be text or a list .*, not int 3"),
        ({"prompt": " ", "answer": "1"}, "column prompt: the prompt is empty"),
        ({"prompt": [], "answer": "1"}, "column prompt: "),
        ({"prompt": [{"role": "user"}], "answer": "1"}, "column prompt: each message must be"),
        ({"prompt": ["text"], "answer": "1"}, "column prompt: each message must be"),
    ],
)
def test_bad_values_are_refused_with_their_place(file: Path, row: dict, message: str):
    same_type = {key: value if value is not None else "1" for key, value in row.items()}
    good = GOOD if file.suffix == ".jsonl" else same_type | {"answer": row["answer"] or "1"}
    if file.suffix == ".jsonl":
        write(file, [good, row])
        place = "data.jsonl, line 2, "
    else:
        write(file, [row])
        place = r"data.parquet, row 0 \(from 0\), "
    with pytest.raises(RequestError, match=place + message) as caught:
        read_prompts(file, **COLUMNS)
    assert "\n" not in str(caught.value)


def test_a_missing_column_is_named_with_the_nearest(file: Path):
    write(file, [{"question": "a", "answers": "1"}])
    with pytest.raises(RequestError, match=r"no column data.prompt_column=prompt; the row has question, answers"):
        read_prompts(file, **COLUMNS)
    with pytest.raises(RequestError, match=r"no column data.answer_column=answer; use answers"):
        read_prompts(file, prompt_column="question", answer_column="answer")
    with pytest.raises(RequestError, match=r"no column data.answer_column=answers.truth; answers has no columns"):
        read_prompts(file, prompt_column="question", answer_column="answers.truth")
    write(file, [{"question": "a", "reward": {"ground_truth": "1"}}])
    with pytest.raises(RequestError, match=r"reward.groundtruth; use reward\.ground_truth$"):
        read_prompts(file, prompt_column="question", answer_column="reward.groundtruth")
    with pytest.raises(RequestError, match=r"reward.x; reward has ground_truth$"):
        read_prompts(file, prompt_column="question", answer_column="reward.x")


def test_missing_numbers_in_a_table_are_no_answer(tmp_path: Path):
    path = write(tmp_path / "data.parquet", [{"prompt": "a", "answer": 1.0}, {"prompt": "b", "answer": float("nan")}])
    with pytest.raises(RequestError, match=r"row 1 \(from 0\), column answer: no answer"):
        read_prompts(path, **COLUMNS)


def test_empty_data_sets_are_refused(tmp_path: Path):
    (tmp_path / "data.jsonl").write_text("\n\n")
    schema = pyarrow.schema([("prompt", pyarrow.string()), ("answer", pyarrow.string())])
    pyarrow.parquet.write_table(schema.empty_table(), tmp_path / "data.parquet")
    for name in ("data.jsonl", "data.parquet"):
        with pytest.raises(RequestError, match=f"{name}: the data set is empty"):
            read_prompts(tmp_path / name, **COLUMNS)
    with pytest.raises(RequestError, match=r"data.jsonl: the data set is empty"):
        read_supervised(tmp_path / "data.jsonl")


def test_unreadable_files_are_refused(tmp_path: Path):
    with pytest.raises(RequestError, match=r"missing.jsonl: no such file"):
        read_prompts(tmp_path / "missing.jsonl", **COLUMNS)
    (tmp_path / "data.csv").write_text("prompt,answer\n")
    with pytest.raises(RequestError, match=r"data.csv: unknown extension '.csv'; use .jsonl, .parquet or .json"):
        read_prompts(tmp_path / "data.csv", **COLUMNS)
    (tmp_path / "not.parquet").write_text("PAR1 nothing more")
    with pytest.raises(RequestError, match=r"not.parquet: not a readable parquet file"):
        read_prompts(tmp_path / "not.parquet", **COLUMNS)
    for name, line in (("cut", b'{"prompt": '), ("bytes", b'{"prompt": "\xff"}'), ("deep", b"[" * 100_000)):
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line)
        with pytest.raises(RequestError, match=rf"{name}.jsonl, line 2: not valid JSON"):
            read_prompts(path, **COLUMNS)
    (tmp_path / "list.jsonl").write_text("[1]\n")
    with pytest.raises(RequestError, match=r"list.jsonl, line 1: must be a JSON object, not list \[1\]"):
        read_prompts(tmp_path / "list.jsonl", **COLUMNS)


def test_supervised_pairs(file: Path):
    write(file, [{"prompt": "1+1=", "response": "Answer: 2"}, {"prompt": "2+1=", "response": "Answer: 3"}])
    pairs = read_supervised(file)
    assert [(prompt.id, prompt.text, response, weight) for prompt, response, weight in pairs] == [
        (0, "1+1=", "Answer: 2", 1.0),
        (1, "2+1=", "Answer: 3", 1.0),
    ]


def test_supervised_weights(file: Path):
    rows = [{"prompt": "1+1=", "response": "2", "w": weight} for weight in (0.25, 2)]
    write(file, rows)
    assert [weight for _, _, weight in read_supervised(file, weight_column="w")] == [0.25, 2.0]
    for bad in (0, -0.5, True, "1", None, math.nan):
        other = write(file.with_name("bad.jsonl"), [*rows, {**rows[0], "w": bad}])
        with pytest.raises(RequestError, match=r"line 3, column w: a weight must be a finite number more than 0, not "):
            read_supervised(other, weight_column="w")


def test_supervised_pairs_of_other_columns(file: Path):
    turns = [{"role": "user", "content": "1+1="}]
    write(file, [{"question": turns, "reward": {"truth": "2"}}])
    ((prompt, response, _),) = read_supervised(file, prompt_column="question", response_column="reward.truth")
    assert (prompt.text, prompt.messages, response) == ("1+1=", (Message("user", "1+1="),), "2")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "line 1: no column response"),
        ({"prompt": "a", "response": ""}, "line 1, column response: "),
        ({"prompt": 1, "response": "b"}, "line 1, column prompt: .*not int 1"),
    ],
)
def test_bad_supervised_rows_are_refused(tmp_path: Path, row: dict, message: str):
    with pytest.raises(RequestError, match=message):
        read_supervised(write(tmp_path / "pairs.jsonl", [row]))


def test_lengths_over_the_limit_name_the_first_row_and_the_limit_that_works():
    check_prompt_lengths([3, 5], 5, "train.jsonl")
    check_prompt_lengths([], 5, "train.jsonl")
    with pytest.raises(
        RequestError,
        match=r"train.jsonl, row 1 .*7 tokens.*data.max_prompt_length=5; 2 of 4 prompts .*at least 9",
    ):
        check_prompt_lengths(np.array([5, 7, 4, 9]), 5, "train.jsonl")


@pytest.fixture
def tokenizer(tmp_path: Path):
    build_tokenizer(tmp_path / "tokenizer")
    return load_tokenizer(tmp_path / "tokenizer")


def test_plain_encoding(tokenizer):
    ids = encode_prompt(tokenizer, Prompt(0, "1+2=", "3"), chat_template=False)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == "1+2="


def test_plain_encoding_keeps_bos_and_drops_eos(tokenizer):
    from tokenizers.processors import TemplateProcessing

    bare = tokenizer.encode("1+2=")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A <eos>", special_tokens=[("<pad>", 0), ("<eos>", 1)]
    )
    assert tokenizer.encode("1+2=") == [0, *bare, 1]
    assert encode_prompt(tokenizer, Prompt(0, "1+2=", "3"), chat_template=False).tolist() == [0, *bare]


def test_an_eos_that_the_prompt_itself_ends_with_stays(tokenizer):
    ids = encode_prompt(tokenizer, Prompt(0, "1<eos>", "3"), chat_template=False)
    assert ids.tolist() == [4, 1]


def test_chat_template(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role|length }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}Answer:{% endif %}"
    )
    plain = encode_prompt(tokenizer, Prompt(0, "1+2=", "3"), chat_template=True)
    assert tokenizer.decode(plain) == "4:1+2=;Answer:"
    turns = (Message("system", "7"), Message("user", "1+2="))
    chat = encode_prompt(tokenizer, Prompt(0, "unused", "3", turns), chat_template=True)
    assert tokenizer.decode(chat) == "6:7;4:1+2=;Answer:"
    assert chat.dtype == np.int32


def test_chat_template_failures_are_refused(tokenizer):
    with pytest.raises(RequestError, match=r"data.chat_template=true, but the tokenizer has no chat template"):
        encode_prompt(tokenizer, Prompt(0, "1+2=", "3"), chat_template=True)
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    with pytest.raises(RequestError, match=r"prompt 5: the chat template refuses the conversation: no system turn"):
        encode_prompt(tokenizer, Prompt(5, "1+2=", "3"), chat_template=True)


@pytest.mark.skipif(not DATA.is_dir(), reason="no data sets beside the repository")
@pytest.mark.parametrize(("name", "rows"), [("aime24", 30), ("aime25", 30), ("dapo-math-17k", 17_917)])
def test_published_data_sets(name: str, rows: int):
    prompts = read_prompts(DATA / f"{name}.parquet", prompt_column="prompt", answer_column="reward_model.ground_truth")
    assert len(prompts) == rows
    assert [prompt.id for prompt in prompts] == list(range(rows))
    assert all(prompt.messages[-1].role == "user" and prompt.text == prompt.messages[-1].content for prompt in prompts)


def test_a_json_list(tmp_path: Path):
    path = tmp_path / "amc.json"
    path.write_text(json.dumps([{"prompt": "a", "answer": 142.0}, {"prompt": TURNS, "answer": "7"}]))
    first, second = read_prompts(path, **COLUMNS)
    assert (first.answer, second.messages[-1].content) == ("142", "1+1?")
    for text, message in (
        ("{}", "must be a JSON list of objects"),
        ("[1]", r"row 0 \(from 0\): must be a JSON object"),
    ):
        path.write_text(text)
        with pytest.raises(RequestError, match=rf"amc.json.*{message}"):
            read_prompts(path, **COLUMNS)


def test_the_answer_behind_a_mark(file: Path):
    write(file, [{"prompt": "a", "answer": "#### 3 and\n#### 1,080 "}, {"prompt": "b", "answer": "no mark"}])
    with pytest.raises(RequestError, match=r"column answer: no '####' in the answer, which data.answer_after asks for"):
        read_prompts(file, **COLUMNS, answer_after="####")
    write(file, [{"prompt": "a", "answer": "#### 3 and\n#### 1,080 "}])
    assert read_prompts(file, **COLUMNS, answer_after="####")[0].answer == "1,080"
    write(file, [{"prompt": "a", "answer": "5 ####"}])
    with pytest.raises(RequestError, match="no answer"):
        read_prompts(file, **COLUMNS, answer_after="####")


def test_an_answer_that_must_be_an_integer(file: Path):
    write(file, [{"prompt": "a", "answer": "025"}, {"prompt": "b", "answer": "1/2"}])
    assert len(read_prompts(file, **COLUMNS)) == 2
    place = r"line 2" if file.suffix == ".jsonl" else r"row 1 \(from 0\)"
    with pytest.raises(RequestError, match=rf"{file.name}, {place}, column answer: .*'1/2' is not an integer"):
        read_prompts(file, **COLUMNS, integer_answers=True)


@pytest.mark.skipif(not DATA.is_dir(), reason="no data sets beside the repository")
@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("amc.json", 83, {"prompt_column": "problem", "answer_column": "answer", "integer_answers": True}),
        ("math500.jsonl", 500, {"prompt_column": "problem", "answer_column": "answer"}),
        (
            "gsm8k-test.jsonl",
            1319,
            {
                "prompt_column": "question",
                "answer_column": "answer",
                "answer_after": "####",
                "integer_answers": True,
            },
        ),
        (
            "aime25.parquet",
            30,
            {"prompt_column": "prompt", "answer_column": "reward_model.ground_truth", "integer_answers": True},
        ),
        (
            "dapo-math-17k.parquet",
            17_917,
            {"prompt_column": "prompt", "answer_column": "reward_model.ground_truth", "integer_answers": True},
        ),
    ],
)
def test_published_forms(name: str, rows: int, columns: dict):
    prompts = read_prompts(DATA / name, **columns)
    assert len(prompts) == rows
    assert all(len(prompt.answer) < 100 and "####" not in prompt.answer for prompt in prompts)


@pytest.mark.skipif(not DATA.is_dir(), reason="no data sets beside the repository")
def test_an_answer_of_math500_that_is_no_integer_is_refused_where_integers_are_demanded():
    with pytest.raises(RequestError, match=r"math500.jsonl, line 1, column answer: .*is not an integer"):
        read_prompts(DATA / "math500.jsonl", prompt_column="problem", answer_column="answer", integer_answers=True)


def test_a_conversation_written_as_text(tmp_path: Path):
    turns = [{"role": "system", "content": "Think."}, {"role": "user", "content": "1+1?"}]
    texts = [json.dumps(turns), '["1", "2"] is a list?', "[1, 2]", "[not JSON", json.dumps([{"role": "user"}])]
    file = write(tmp_path / "data.jsonl", [{"prompt": text, "answer": "2"} for text in texts])
    prompts = read_prompts(file, prompt_column="prompt", answer_column="answer")
    assert prompts[0].messages == (Message("system", "Think."), Message("user", "1+1?"))
    assert (prompts[0].text, prompts[0].question) == ("Think.\n\n1+1?", "1+1?")
    assert [prompt.text for prompt in prompts[1:]] == texts[1:]
    assert all(prompt.messages is None and prompt.question == prompt.text for prompt in prompts[1:])
