import hashlib
import json
import re
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.data.arithmetic import (
    Chains,
    build_tokenizer,
    direct_response,
    generate_task,
    is_validation,
    solve,
    terse_response,
    worked_response,
)
from dapo_megatron.errors import RequestError

REQUEST = {
    "terms": [4, 5, 6],
    "operand_max": 9,
    "total_max": 99,
    "train_prompts": 600,
    "validation_prompts": 60,
    "supervised_examples": 200,
    "direct_fraction": 0.6,
    "seed": 3,
}
FILES = ("train", "validation", "worked", "mixed")


def read(folder: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def running_totals(question: str) -> list[int]:
    """An independent reader: signs and operands by regular expression."""
    totals, total = [], 0
    for sign, operand in re.findall(r"([+-]?)([0-9]+)", question):
        total = total - int(operand) if sign == "-" else total + int(operand)
        totals.append(total)
    return totals


def every_question(terms: int, operand_max: int, total_max: int) -> set[str]:
    grown = {(str(operand), operand) for operand in range(1, operand_max + 1) if operand <= total_max}
    for _ in range(terms - 1):
        grown = {
            (f"{text}{operand:+d}", total + operand)
            for text, total in grown
            for operand in range(-operand_max, operand_max + 1)
            if operand and 0 <= total + operand <= total_max
        }
    return {text + "=" for text, _ in grown}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    generate_task(folder, **REQUEST)
    return folder


def test_responses_of_the_published_example():
    assert worked_response("7-1+9-7-8=") == "7-1=6;6+9=15;15-7=8;8-8=0;Answer: 0"
    assert terse_response("7-1+9-7-8=") == "7-1=6+9=15-7=8-8=0;Answer: 0"
    assert direct_response("7-1+9-7-8=") == "Answer: 0"
    assert solve("7-1+9-7-8=") == 0


def test_questions_follow_the_rules(task: Path):
    for side in ("train", "validation"):
        rows = read(task, side)
        assert len(rows) == REQUEST[f"{side}_prompts"]
        assert len({row["prompt"] for row in rows}) == len(rows)
        for row in rows:
            assert re.fullmatch(r"[1-9]([+-][1-9]){3,5}=", row["prompt"])
            totals = running_totals(row["prompt"])
            assert min(totals) >= 0 and max(totals) <= 99
            assert row["answer"] == str(totals[-1])


def test_each_number_of_terms_has_its_share(task: Path):
    lengths = [len(running_totals(row["prompt"])) for row in read(task, "train")]
    assert {n: lengths.count(n) for n in set(lengths)} == {4: 200, 5: 200, 6: 200}


def test_validation_is_held_out_by_checksum(task: Path):
    held_out = {row["prompt"] for row in read(task, "validation")}
    assert all(zlib.crc32(prompt.encode()) % 16 == 0 for prompt in held_out)
    for name in ("train", "worked", "mixed"):
        assert all(zlib.crc32(row["prompt"].encode()) % 16 != 0 for row in read(task, name))


def test_supervised_rows_are_worked_or_direct(task: Path):
    worked, mixed = read(task, "worked"), read(task, "mixed")
    assert len(worked) == len(mixed) == 200
    for row in worked:
        *steps, last = row["response"].split(";")
        totals = running_totals(row["prompt"])
        assert [int(step.split("=")[1]) for step in steps] == totals[1:]
        assert [int(re.match("[0-9]+", step)[0]) for step in steps] == totals[:-1]
        assert last == f"Answer: {totals[-1]}"
    direct = [row for row in mixed if row["response"] == f"Answer: {running_totals(row['prompt'])[-1]}"]
    assert len(direct) == 120
    assert all(row["response"] == worked_response(row["prompt"]) for row in mixed if row not in direct)


def test_a_share_of_the_mixed_rows_is_terse_and_the_rest_stays(task: Path, tmp_path: Path):
    generate_task(tmp_path, **REQUEST | {"terse_fraction": 0.25})
    assert (tmp_path / "worked.jsonl").read_bytes() == (task / "worked.jsonl").read_bytes()
    before, after = read(task, "mixed"), read(tmp_path, "mixed")
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) == 50
    for old, new in changed:
        assert old == {"prompt": new["prompt"], "response": worked_response(new["prompt"])}
        first, *steps = re.findall(r"[+-]?[0-9]+", new["prompt"])
        totals = running_totals(new["prompt"])
        joined = "".join(f"{step}={total}" for step, total in zip(steps, totals[1:], strict=True))
        assert new["response"] == f"{first}{joined};Answer: {totals[-1]}"


def test_the_defaults_make_the_bytes_they_always_made(task: Path):
    digests = {name: hashlib.sha256((task / f"{name}.jsonl").read_bytes()).hexdigest()[:16] for name in FILES}
    assert digests == {
        "train": "7395ec55712e02c2",
        "validation": "836b0d1b5a3e1112",
        "worked": "56239a048ba389d6",
        "mixed": "bc9a9208e3326eaf",
    }


def test_same_seed_same_bytes_and_another_seed_other_questions(task: Path, tmp_path: Path):
    generate_task(tmp_path / "again", **REQUEST)
    generate_task(tmp_path / "other", **REQUEST | {"seed": 4})
    for name in FILES:
        again = (tmp_path / "again" / f"{name}.jsonl").read_bytes()
        assert again == (task / f"{name}.jsonl").read_bytes()
        assert again != (tmp_path / "other" / f"{name}.jsonl").read_bytes()


def test_resizing_training_leaves_validation_alone(task: Path, tmp_path: Path):
    generate_task(tmp_path, **REQUEST | {"train_prompts": 30, "supervised_examples": 0})
    assert (tmp_path / "validation.jsonl").read_bytes() == (task / "validation.jsonl").read_bytes()
    assert (tmp_path / "mixed.jsonl").read_bytes() == b""


@given(st.integers(2, 4), st.integers(1, 4), st.integers(1, 12))
def test_numbering_covers_every_question_once(terms: int, operand_max: int, total_max: int):
    chains = Chains(terms, operand_max, total_max)
    listed = [chains.question(terms, number) for number in range(chains.count(terms))]
    assert sorted(listed) == sorted(every_question(terms, operand_max, total_max))
    with pytest.raises(IndexError):
        chains.question(terms, chains.count(terms))


def test_the_whole_space_can_be_asked_for_but_not_one_more(tmp_path: Path):
    space = every_question(3, 5, 12)
    held_out = {question for question in space if is_validation(question)}
    small = REQUEST | {"terms": [3], "operand_max": 5, "total_max": 12, "supervised_examples": 5}
    whole = small | {"train_prompts": len(space - held_out), "validation_prompts": len(held_out)}
    generate_task(tmp_path / "whole", **whole)
    assert {row["prompt"] for row in read(tmp_path / "whole", "train")} == space - held_out
    assert {row["prompt"] for row in read(tmp_path / "whole", "validation")} == held_out
    for side in ("train", "validation"):
        key, most = f"{side}_prompts", whole[f"{side}_prompts"]
        with pytest.raises(RequestError, match=rf"data\.generate\.{key}={most + 1} .*use at most {most}$"):
            generate_task(tmp_path / "more", **whole | {key: most + 1})
    assert not (tmp_path / "more").exists()


def test_a_short_length_that_runs_out_leaves_the_rest_to_the_others(tmp_path: Path):
    generate_task(tmp_path, **REQUEST | {"terms": [2, 5], "train_prompts": 1000})
    lengths = [len(running_totals(row["prompt"])) for row in read(tmp_path, "train")]
    short = sum(not is_validation(question) for question in every_question(2, 9, 99))
    assert lengths.count(2) == short < 500
    assert lengths.count(5) == 1000 - short


def test_many_terms_are_drawn_without_listing_the_space(tmp_path: Path):
    generate_task(tmp_path, **REQUEST | {"terms": [30], "train_prompts": 5, "validation_prompts": 5})
    assert len(running_totals(read(tmp_path, "train")[0]["prompt"])) == 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"terms": []}, r"data\.generate\.terms=\[\]"),
        ({"terms": [1, 4]}, r"data\.generate\.terms=\[1, 4\]"),
        ({"terms": [4, 4]}, r"data\.generate\.terms=\[4, 4\]"),
        ({"operand_max": 0}, r"data\.generate\.operand_max=0 .*at least 1"),
        ({"total_max": 0}, r"data\.generate\.total_max=0 .*at least 1"),
        ({"train_prompts": 0}, r"data\.generate\.train_prompts=0 .*at least 1"),
        ({"validation_prompts": 0}, r"data\.generate\.validation_prompts=0 .*at least 1"),
        ({"supervised_examples": -1}, r"data\.generate\.supervised_examples=-1 .*at least 0"),
        ({"direct_fraction": 1.5}, r"data\.generate\.direct_fraction=1\.5 .*use 1\.0"),
        ({"terse_fraction": -0.5}, r"data\.generate\.terse_fraction=-0\.5 .*use 0\.0"),
        (
            {"terse_fraction": 0.5},
            r"terse_fraction=0\.5 and direct_fraction=0\.6 exceed 1 .*use terse_fraction=0\.4 or",
        ),
    ],
)
def test_impossible_requests_are_refused(tmp_path: Path, change: dict, message: str):
    with pytest.raises(RequestError, match=message):
        generate_task(tmp_path / "task", **REQUEST | change)
    assert not (tmp_path / "task").exists()


@pytest.fixture(scope="module", params=[None, "qwen2", "llama", "qwen3"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """As any outside program loads it: AutoTokenizer, beside the config.json of each model family."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    assert build_tokenizer(folder) == 20
    if request.param:
        (folder / "config.json").write_text(json.dumps({"model_type": request.param}))
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def test_tokenizer_special_tokens(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) == 20


def test_tokenizer_makes_one_token_a_character_and_one_of_answer(tokenizer):
    text = worked_response("7-1+9-7-8=")
    ids = tokenizer.encode(text)
    assert len(ids) == len(text) - len("Answer") + 1
    assert [tokenizer.decode([i]) for i in ids][-4:] == ["Answer", ":", " ", "0"]


@given(text=st.lists(st.sampled_from([*"0123456789+-=;: ", "Answer"])).map("".join))
def test_tokenizer_round_trip(tokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id, 0], skip_special_tokens=True) == text
    assert max(ids, default=0) < 20


def test_all_generated_text_is_known_to_the_tokenizer(task: Path, tokenizer):
    for row in read(task, "mixed"):
        assert 2 not in tokenizer.encode(row["prompt"] + row["response"])
