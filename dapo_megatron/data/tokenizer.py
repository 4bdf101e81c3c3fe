"""Tokenizers from a Hugging Face folder: tokenizer.json, or SentencePiece's tokenizer.model. Never from the network."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapo_megatron.errors import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts on which transformers and SentencePiece must agree: digits, doubled spaces, a line break, non-ASCII.
# Not a leading space: before one transformers never adds SentencePiece's own, in any Llama tokenizer.
_PROBES = ("Answer: 12", "two  spaces", "line\nbreak", "x² = 4, ½ · 数")


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerBase":
    """The transformers tokenizer of `folder`, which holds tokenizer.json or tokenizer.model.

    Code shipped in the folder is not run. A folder with tokenizer.model alone and no tokenizer class is read as
    Llama's, and its encoding is compared with SentencePiece's own.

    Raises:
        RequestError: no such folder, no tokenizer in it, or one that cannot be read faithfully.
    """
    folder = Path(folder)
    fast = _tokenizer_file(folder).name == "tokenizer.json"
    settings = _read_json(folder / "tokenizer_config.json", {})
    import transformers

    if fast and settings.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend"):
        # AutoTokenizer prefers the class of config.json's model_type, which ignores parts of tokenizer.json
        kind = transformers.PreTrainedTokenizerFast
    elif fast or "tokenizer_class" in settings:
        kind = transformers.AutoTokenizer
    else:
        kind = transformers.LlamaTokenizer
    try:
        tokenizer = kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the readers below raise bare Exception for broken files
        raise RequestError(f"{folder}: cannot read the tokenizer: {_first_line(error)}") from error
    if not fast:
        _check_against_sentencepiece(tokenizer, folder)
    return tokenizer


def stop_tokens(eos_token_ids: Iterable[int], tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """Ends of sequence: those of config.json and the tokenizer's own."""
    return {*eos_token_ids, tokenizer.eos_token_id} - {None}


def vocabulary_size(folder: str | Path) -> int:
    """1 + the highest token id of the tokenizer in `folder`, added tokens counted: the least rows an embedding needs.

    Reads the files themselves and imports neither torch nor transformers.

    Raises:
        RequestError: no such folder, no tokenizer in it, or a broken file.
    """
    folder = Path(folder)
    file = _tokenizer_file(folder)
    try:
        highest = (
            _highest_id(_read_json(file, {})) if file.suffix == ".json" else _sentencepiece(file).get_piece_size() - 1
        )
        settings = _read_json(folder / "tokenizer_config.json", {})
        added = [int(token) for token in settings.get("added_tokens_decoder", {})]
        added += [int(token) for token in _read_json(folder / "added_tokens.json", {}).values()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise RequestError(f"{file}: not a tokenizer that can be read: {_first_line(error)}") from error
    return 1 + max([highest, *added])


def _highest_id(tokenizer: dict[str, Any]) -> int:
    vocabulary = tokenizer["model"]["vocab"]
    # Unigram lists (piece, score) in the order of ids; the other models map piece to id
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    return max([int(i) for i in ids] + [int(token["id"]) for token in tokenizer.get("added_tokens", [])])


def _tokenizer_file(folder: Path) -> Path:
    if not folder.is_dir():
        raise RequestError(f"{folder} is not a folder; model.path must name a local Hugging Face folder")
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return folder / name
    raise RequestError(
        f"{folder} holds neither tokenizer.json nor tokenizer.model; put the model's tokenizer files there"
    )


def _read_json(path: Path, default: dict[str, Any]) -> dict[str, Any]:
    if not path.is_file():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RequestError(f"{path}: not valid JSON: {_first_line(error)}") from error
    if not isinstance(value, dict):
        raise RequestError(f"{path}: must hold a JSON object, not {type(value).__name__}")
    return value


def _sentencepiece(file: Path) -> Any:
    try:
        import sentencepiece
    except ImportError as error:
        raise RequestError(f"{file} needs the sentencepiece package; install it or add a tokenizer.json") from error
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise RequestError(f"{file}: not a SentencePiece model: {_first_line(error)}") from error


def _check_against_sentencepiece(tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    model = _sentencepiece(folder / "tokenizer.model")
    ids = range(min(model.get_piece_size(), 2000))
    pieces = [i for i in ids if not (model.is_control(i) or model.is_byte(i) or model.is_unknown(i))]
    # a text of the model's own pieces shows whether they are merged in the same order
    for text in (*_PROBES, model.decode(pieces).strip()):
        if tokenizer.encode(text, add_special_tokens=False) != model.encode(text):
            raise RequestError(
                f"{folder}: transformers encodes {text[:60]!r} differently from SentencePiece's tokenizer.model; "
                "save the tokenizer as tokenizer.json beside it"
            )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
