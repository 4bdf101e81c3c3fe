"""Is a folder a reward model, or a judge? Told from config.json and the names of files; no torch."""

import json
from pathlib import Path
from typing import Any

from dapo_megatron.config.reward import Judge, RewardModel
from dapo_megatron.data.tokenizer import vocabulary_size
from dapo_megatron.errors import RequestError


def check_reward_model(settings: RewardModel) -> None:
    """Refuse a folder that is no reward model; reads config.json and names of files.

    Raises:
        RequestError: what is wrong with it.
    """
    if settings.path is None:
        raise RequestError("reward.grader=model needs reward.model.path, a folder with a sequence classifier")
    what = f"reward.model.path={settings.path}"
    config = _check_kind(Path(settings.path), what, "sequence classifier", "ForSequenceClassification")
    labels = config.get("num_labels") or len(config.get("id2label") or (0, 1))  # two is what is not written down
    if labels != 1:
        raise RequestError(f"{what} has num_labels={labels}; a reward model has one label, so use num_labels=1")
    _check_files(Path(settings.path), what, config)
    _check_chat_template(Path(settings.path), what, settings.chat_template, "reward.model")


def check_judge_folder(settings: Judge) -> None:
    """Refuse a folder that is no language model; reads config.json and names of files. `settings.model` names it.

    Raises:
        RequestError: what is wrong with it.
    """
    folder, what = Path(settings.model), f"reward.judge.model={settings.model}"
    config = _check_kind(folder, what, "language model", "ForCausalLM")
    _check_files(folder, what, config)
    _check_chat_template(folder, what, settings.chat_template, "reward.judge")


def _check_kind(folder: Path, what: str, kind: str, ending: str) -> dict[str, Any]:
    """The folder's config.json, whose architecture must end in `ending`."""
    if not folder.is_dir():
        raise RequestError(f"{what} is not a folder; give a Hugging Face folder with a {kind}")
    config = read_config(folder, what)
    names = config.get("architectures") or []
    if not any(str(name).endswith(ending) for name in names):
        raise RequestError(
            f"{what} is no {kind}: config.json has architectures={names}; it needs one that ends in {ending}"
        )
    return config


def _check_files(folder: Path, what: str, config: dict[str, Any]) -> None:
    if not any(folder.glob("*.safetensors")):
        raise RequestError(f"{what} has no .safetensors file; save the model again with safetensors")
    try:
        tokens = vocabulary_size(folder)
    except RequestError as error:
        raise RequestError(f"{what} has no tokenizer that can be read: {error}") from None
    rows = config.get("vocab_size")
    if isinstance(rows, int) and tokens > rows:
        raise RequestError(f"{what}: its tokenizer has ids up to {tokens - 1} and its model {rows} vocabulary rows")


def _check_chat_template(folder: Path, what: str, wanted: bool, section: str) -> None:
    if wanted and not _has_chat_template(folder):
        raise RequestError(f"{what}: its tokenizer has no chat template; use {section}.chat_template=false")


def read_config(folder: Path, what: str) -> dict[str, Any]:
    """Its config.json; `what` names the folder in a RequestError, raised where there is none that can be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise RequestError(f"{what} has no config.json; give a Hugging Face folder") from None
    except ValueError as error:
        raise RequestError(f"{what}: config.json is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise RequestError(f"{what}: config.json is not a JSON object")
    return config


def _has_chat_template(folder: Path) -> bool:
    if any(folder.glob("chat_template.*")) or any(folder.glob("additional_chat_templates/*")):
        return True
    try:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(settings, dict) and bool(settings.get("chat_template"))
