import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dapo_megatron.data.prompts import read_prompts
from dapo_megatron.errors import RequestError

COLUMNS = {"prompt_column": "prompt", "answer_column": "answer"}
FILES = {
    "README.md": "# not data",
    "data/train-00001-of-00002.jsonl": '{"prompt": "second", "answer": "2"}\n',
    "data/train-00000-of-00002.jsonl": '{"prompt": "first", "answer": "1"}\n',
    "test.json": '[{"prompt": "held out", "answer": "3"}]',
    "extra/retrain.jsonl": '{"prompt": "other", "answer": "4"}\n',
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A hub that is a folder; asks are recorded."""
    asked = []

    def list_repo_files(repository: str, *, repo_type: str):
        asked.append((repository, repo_type))
        if repository != "org/maths":
            raise OSError("404: no such repository\nwith a long tail")
        return list(FILES)

    def hf_hub_download(repository: str, file: str, *, repo_type: str):
        path = tmp_path / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FILES[file])
        return str(path)

    fake = SimpleNamespace(list_repo_files=list_repo_files, hf_hub_download=hf_hub_download, asked=asked)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    return fake


@pytest.mark.parametrize(
    ("name", "questions"),
    [
        ("hub:org/maths", ["first", "second"]),
        ("hub:org/maths:train", ["first", "second"]),
        ("hub:org/maths:test", ["held out"]),
        ("hub:org/maths:extra/retrain.jsonl", ["other"]),
    ],
)
def test_splits_and_files(hub, name: str, questions: list[str]):
    prompts = read_prompts(Path(name), **COLUMNS)  # a recipe keeps names as paths
    assert [prompt.text for prompt in prompts] == questions
    assert [prompt.id for prompt in prompts] == list(range(len(questions)))
    assert hub.asked == [("org/maths", "dataset")]


def test_what_is_not_there(hub):
    with pytest.raises(RequestError, match=r"hub:org/maths:dev: no data of 'dev'; the data set has data/train-00000"):
        read_prompts("hub:org/maths:dev", **COLUMNS)
    with pytest.raises(RequestError, match=r"hub:org/none cannot be had: 404: no such repository; download") as caught:
        read_prompts("hub:org/none", **COLUMNS)
    assert "\n" not in str(caught.value)
    for name in ("hub:maths", "hub:org/maths/", "hub:org/maths:", "hub:../..:x y"):
        with pytest.raises(RequestError, match="not a name of the hub; use hub:ORG/NAME"):
            read_prompts(name, **COLUMNS)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(RequestError, match="hub:org/maths needs the package huggingface_hub; install it, or"):
        read_prompts("hub:org/maths", **COLUMNS)
