"""What a conversion is asked for, and what of it is refused. No torch."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dapo_megatron.errors import RequestError

KINDS = ("hf-to-megatron", "megatron-to-hf", "hf-to-hf", "megatron-to-megatron")
DTYPES = {"keep": None, "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
RESIDENT_BYTES = 352 << 20  # Python, torch and indices; measured 285 MiB, the rest is for what freed memory leaves
LEAST_MEMORY = 448 << 20
PIECES_AT_ONCE = 6  # two sides of a comparison: read, assembled, converted
MOST_PIECE = 64 << 20  # larger ones are no faster


@dataclass(frozen=True)
class Options:
    """`dtype`: a key of DTYPES; sizes in bytes; `weights_only`: leave optimizer state behind; `critic`: that of the
    checkpoint in the policy's place."""

    dtype: str = "keep"
    max_memory: int = 2 << 30
    file_size: int = 4 << 30
    verify: bool = True
    allow_loss: bool = False
    weights_only: bool = False
    critic: bool = False

    @property
    def piece_bytes(self) -> int:
        """The most of a tensor that is handled at a time."""
        return min(MOST_PIECE, (self.max_memory - RESIDENT_BYTES) // PIECES_AT_ONCE)


def parse_size(setting: str, text: str) -> int:
    """Bytes of "2GiB", "512MiB", "4e9" …

    Raises:
        RequestError: not a size.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    try:
        return int(float(match[1]) * UNITS[match[2].upper()])
    except (TypeError, ValueError, KeyError, OverflowError):
        raise RequestError(f"{setting}={text} is not a size; write for example 2GiB or 512MiB") from None


def check_request(kind: str, source: Path, destination: Path, overrides: Sequence[str], options: Options) -> None:
    """What can be told without opening the source.

    Raises:
        RequestError: a value that cannot work; no such source; a destination that exists or lies inside the source;
            settings that conversion does not have.
    """
    _check_options(options)
    _check_paths(source, destination)
    if options.critic and kind != "megatron-to-hf":
        raise RequestError(f"--critic is an option of megatron-to-hf; {kind} leaves a critic behind")
    for override in overrides:
        if not override.startswith("parallel."):
            raise RequestError(f"convert takes parallel.* settings only, not {override}")
        if kind == "hf-to-hf":
            raise RequestError(f"hf-to-hf has no layout; leave out {override}")


def _check_options(options: Options) -> None:
    if options.dtype not in DTYPES:
        raise RequestError(f"--dtype {options.dtype} is not known; use one of {', '.join(DTYPES)}")
    if options.max_memory < LEAST_MEMORY:
        mib = options.max_memory / (1 << 20)
        raise RequestError(f"--max-memory {mib:.0f}MiB is too little; Python and torch leave room from 448MiB on")
    if options.file_size < 1:
        raise RequestError(f"--file-size {options.file_size} is too little; use 1MiB or more")


def _check_paths(source: Path, destination: Path) -> None:
    here, there = source.resolve(), destination.resolve()
    if here == there:
        raise RequestError(f"source and destination are the same folder, {source}; name a new folder")
    if not source.is_dir():
        raise RequestError(f"there is no folder {source}")
    if destination.exists() or destination.is_symlink():
        raise RequestError(f"{destination} exists; name a new folder")
    if here in there.parents:
        raise RequestError(f"{destination} lies inside the source {source}; name a folder outside it")
    if not destination.name:
        raise RequestError(f"{destination} names no folder")
