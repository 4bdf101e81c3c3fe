"""Data sets of the Hugging Face hub: `hub:ORG/NAME`, `hub:ORG/NAME:SPLIT`, `hub:ORG/NAME:path/to/file.parquet`."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from dapo_megatron.errors import RequestError

PREFIX = "hub:"
DEFAULT_SPLIT = "train"
_NAME = re.compile(r"hub:([\w.-]+/[\w.-]+)(?::([\w./-]+))?", re.ASCII)
_SHOWN_FILES = 8  # of a data set in a message


def hub_files(name: str, extensions: Sequence[str]) -> list[Path]:
    """Local copies of the files that a hub name stands for, in the order of their names.

    A split is found by the names of the files: `train-00000-of-00002.parquet`, `data/train.jsonl`, `train/0.parquet`.
    Without a split, the only data file there is, or `train`. Files come through `huggingface_hub`, whose cache and
    time limits (HF_HUB_ETAG_TIMEOUT, HF_HUB_DOWNLOAD_TIMEOUT, 10 s each) apply.

    Raises:
        RequestError: not such a name, no huggingface_hub, a hub out of reach, no such data set, split or file.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise RequestError(f"{name}: not a name of the hub; use hub:ORG/NAME or hub:ORG/NAME:SPLIT")
    repository, part = match.groups()
    names = [file for file in _list_files(repository) if PurePosixPath(file).suffix in extensions]
    chosen = _choose(names, part)
    if not chosen:
        there = ", ".join(sorted(names)[:_SHOWN_FILES]) or f"no file in {', '.join(extensions)}"
        raise RequestError(f"{name}: no data of {part or DEFAULT_SPLIT!r}; the data set has {there}")
    return [_download(repository, file) for file in chosen]


def _choose(names: Sequence[str], part: str | None) -> list[str]:
    if part in names:
        return [part]
    if part is None and len(names) == 1:
        return list(names)
    split = part or DEFAULT_SPLIT
    return sorted(name for name in names if split in re.split(r"[/.]|-(?=\d)", name))


def _list_files(repository: str) -> list[str]:
    return list(_ask(repository, lambda hub: hub.list_repo_files(repository, repo_type="dataset")))


def _download(repository: str, file: str) -> Path:
    return Path(_ask(repository, lambda hub: hub.hf_hub_download(repository, file, repo_type="dataset")))


def _ask(repository: str, call):
    try:
        import huggingface_hub
    except ImportError:
        raise RequestError(
            f"hub:{repository} needs the package huggingface_hub; install it, or download the file and name its path"
        ) from None
    try:
        return call(huggingface_hub)
    except Exception as error:  # its errors come from several libraries beneath
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RequestError(
            f"hub:{repository} cannot be had: {reason}; download the file elsewhere and name its path"
        ) from error
