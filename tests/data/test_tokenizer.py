import argparse
import inspect
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dapo_megatron.data.arithmetic import build_tokenizer
from dapo_megatron.data.tokenizer import load_tokenizer, vocabulary_size
from dapo_megatron.errors import RequestError

QWEN = Path(__file__).parents[3] / "shared" / "data" / "qwen2.5-tokenizer"


@pytest.fixture
def arithmetic(tmp_path: Path) -> Path:
    build_tokenizer(tmp_path / "arithmetic")
    return tmp_path / "arithmetic"


@pytest.fixture(scope="module")
def sentencepiece_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BPE and a unigram SentencePiece model."""
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    corpus = folder / "corpus.txt"
    corpus.write_text(
        "\n".join(f"{a} plus {a * 7 % 89} is, Answer: {a}" for a in range(99)) + inspect.getsource(argparse)
    )
    for kind in ("bpe", "unigram"):
        (folder / kind).mkdir()
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=str(folder / kind / "tokenizer"),
            model_type=kind,
            vocab_size=900,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        (folder / kind / "tokenizer.vocab").unlink()
    return folder


def test_loads_without_the_network(arithmetic: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*args, **kwargs):
        raise AssertionError("tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    tokenizer = load_tokenizer(arithmetic)
    assert tokenizer.decode(tokenizer.encode("1+2=3;Answer: 3")) == "1+2=3;Answer: 3"


def test_tokenizer_json_is_followed_beside_any_model(arithmetic: Path):
    (arithmetic / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    assert 2 in load_tokenizer(arithmetic).encode("x")  # Qwen2's own class would drop what it does not know


def test_vocabulary_size_counts_added_tokens(arithmetic: Path):
    assert vocabulary_size(arithmetic) == 20
    tokenizer = load_tokenizer(arithmetic)
    tokenizer.add_tokens(["more", "and more"])
    tokenizer.save_pretrained(arithmetic / "grown")
    assert vocabulary_size(arithmetic / "grown") == 22


def test_vocabulary_size_is_one_more_than_the_highest_id(tmp_path: Path):
    vocabulary = {"a": 0, "b": 7}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocabulary}}))
    assert vocabulary_size(tmp_path) == 8
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": 11}))
    assert vocabulary_size(tmp_path) == 12
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"15": {"content": "<x>"}}}))
    assert vocabulary_size(tmp_path) == 16


def test_vocabulary_size_of_a_unigram_json(tmp_path: Path):
    model = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -2.0]]}
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": model, "added_tokens": [{"id": 3, "content": "<x>"}]})
    )
    assert vocabulary_size(tmp_path) == 4


def test_vocabulary_size_imports_neither_torch_nor_transformers(arithmetic: Path):
    code = (
        "import sys; from dapo_megatron.data.tokenizer import vocabulary_size; "
        f"assert vocabulary_size({str(arithmetic)!r}) == 20; "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parents[2])


@pytest.mark.skipif(not QWEN.is_dir(), reason="no Qwen2.5 tokenizer beside the repository")
def test_qwen_tokenizer():
    assert vocabulary_size(QWEN) == 151_665
    tokenizer = load_tokenizer(QWEN)
    text = "Answer: $x^2$ = 12,345\n数学"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == 151_645


@pytest.mark.parametrize("settings", [None, {"tokenizer_class": "LlamaTokenizer"}])
def test_sentencepiece_folder_encodes_as_sentencepiece_does(
    sentencepiece_files: Path, tmp_path: Path, settings: dict | None
):
    import sentencepiece

    (tmp_path / "tokenizer.model").write_bytes((sentencepiece_files / "bpe" / "tokenizer.model").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if settings:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer(tmp_path)
    for text in ("12 plus 84 is", "Answer: 96", "unseen ünïcode"):
        assert tokenizer.encode(text, add_special_tokens=False) == model.encode(text)
    assert vocabulary_size(tmp_path) == model.get_piece_size()


def test_sentencepiece_model_that_transformers_misreads_is_refused(sentencepiece_files: Path):
    with pytest.raises(RequestError, match="differently from SentencePiece"):
        load_tokenizer(sentencepiece_files / "unigram")


@pytest.mark.parametrize("function", [load_tokenizer, vocabulary_size])
def test_broken_folders_are_refused(tmp_path: Path, function):
    with pytest.raises(RequestError, match=r"missing is not a folder; model\.path"):
        function(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RequestError, match=r"neither tokenizer.json nor tokenizer.model"):
        function(tmp_path / "empty")
    for name, content in (("json", '{"model": '), ("list", "[]"), ("shape", '{"model": {"vocab": 3}}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(content)
        with pytest.raises(RequestError, match=name) as caught:
            function(tmp_path / name)
        assert "\n" not in str(caught.value)
    (tmp_path / "piece").mkdir()
    (tmp_path / "piece" / "tokenizer.model").write_bytes(b"nothing of the kind")
    with pytest.raises(RequestError, match="piece"):
        function(tmp_path / "piece")
