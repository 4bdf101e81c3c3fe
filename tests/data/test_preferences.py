import json

import pytest

from dapo_megatron.data.preferences import read_preferences
from dapo_megatron.errors import RequestError

COLUMNS = {"prompt_column": "prompt", "chosen_column": "chosen", "rejected_column": "rejected"}


def write(folder, *rows):
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_texts_and_conversations(tmp_path):
    talk = [{"role": "user", "content": "q"}]
    path = write(
        tmp_path,
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
        {
            "prompt": talk,
            "chosen": [*talk, {"role": "assistant", "content": "yes"}],
            "rejected": [*talk, {"role": "assistant", "content": "no"}],
        },
    )
    first, second = read_preferences(path, **COLUMNS)
    assert (first.prompt.id, first.prompt.text, first.chosen, first.rejected) == (0, "2+2?", "4", "5")
    assert (second.prompt.id, second.chosen, second.rejected) == (1, "yes", "no")
    assert [turn.content for turn in second.prompt.messages] == ["q"]


def test_nested_columns(tmp_path):
    path = write(tmp_path, {"q": {"text": "2+2?"}, "a": {"good": "4", "bad": "5"}})
    names = {"prompt_column": "q.text", "chosen_column": "a.good", "rejected_column": "a.bad"}
    assert [(p.chosen, p.rejected) for p in read_preferences(path, **names)] == [("4", "5")]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "line 1: chosen and rejected are the same text"),
        ({"prompt": "q", "chosen": " ", "rejected": "a"}, "line 1, column chosen: a response must be a text"),
        ({"prompt": "q", "chosen": "a", "rejected": 3}, "line 1, column rejected: a response must be .* not int 3"),
        ({"prompt": "q", "chosen": "a", "rejected": []}, "column rejected: a response must be"),
        ({"prompt": "q", "chosen": "a", "rejected": [{"role": "user"}]}, "column rejected: a response must be"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "column prompt: the prompt is empty"),
        ({"prompt": "q", "chosen": "a", "reject": "b"}, "no column data.rejected_column=rejected; use reject"),
    ],
)
def test_what_is_refused(tmp_path, row, told):
    with pytest.raises(RequestError, match=told):
        read_preferences(write(tmp_path, row), **COLUMNS)


def test_an_empty_file(tmp_path):
    with pytest.raises(RequestError, match="at least 1 pair"):
        read_preferences(write(tmp_path), **COLUMNS)
