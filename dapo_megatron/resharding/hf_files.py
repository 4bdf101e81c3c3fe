"""Hugging Face folders as a place where slices lie: read a rank's boxes from safetensors, write a folder."""

import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.files import atomic_path, replace_folder, write_text_atomically
from dapo_megatron.resharding.hf_layout import INDEX, ROTARY_BUFFER, SINGLE, TOKENIZER_FILES, read_headers
from dapo_megatron.resharding.layout import Placement
from dapo_megatron.resharding.transport import local_view

SIDE_FILES = ("config.json", "generation_config.json", *TOKENIZER_FILES)
TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def dtype_name(dtype: torch.dtype) -> str:
    """The name that safetensors gives a dtype: "BF16" for torch.bfloat16."""
    return next(name for name, known in TORCH_DTYPES.items() if known is dtype)


@torch.no_grad()
def read_placements(
    folder: Path,
    placements: Sequence[Placement],
    tensors: Mapping[str, Tensor],
    *,
    optional: Collection[str] = (),
) -> None:
    """Fill the local tensors from the folder's files, reading only the boxes asked for; what no placement covers
    becomes 0, and so do tensors of the names `optional` that the files lack.

    Raises:
        RequestError: a tensor that the files lack.
    """
    headers = read_headers(folder)
    for key in {placement.key for placement in placements}:
        tensors[key].zero_()  # padded vocabulary rows
    by_file: dict[Path, list[Placement]] = {}
    for placement in placements:
        if placement.name not in headers:
            if placement.name in optional:
                continue
            raise RequestError(f"{folder} lacks {placement.name}")
        by_file.setdefault(headers[placement.name][0], []).append(placement)
    for path, wanted in by_file.items():
        with safe_open(path, framework="pt", device="cpu") as file:
            for placement in wanted:
                part = file.get_slice(placement.name)[tuple(slice(a, b) for a, b in placement.box)]
                local_view(tensors, placement.key, placement.offset, placement.shape).copy_(part)


def folder_dtype(folder: Path) -> torch.dtype:
    """The one dtype of the folder's tensors.

    Raises:
        RequestError: they differ, or are of a kind that is not trained.
    """
    dtypes = {dtype for name, (_, dtype, _) in read_headers(folder).items() if not name.endswith(ROTARY_BUFFER)}
    if len(dtypes) != 1 or not dtypes <= set(TORCH_DTYPES):
        raise RequestError(
            f"{folder} holds tensors of dtype {', '.join(sorted(dtypes))}; one of F32, BF16, F16 is expected"
        )
    return TORCH_DTYPES[dtypes.pop()]


def file_groups(shapes: Mapping[str, tuple[int, ...]], itemsize: int, most_bytes: int) -> Iterator[list[str]]:
    """Tensor names in order, cut into groups of at most `most_bytes` (a larger tensor stands alone)."""
    group: list[str] = []
    load = 0
    for name, shape in shapes.items():
        size = itemsize
        for extent in shape:
            size *= extent
        if group and load + size > most_bytes:
            yield group
            group, load = [], 0
        group.append(name)
        load += size
    if group:
        yield group


def write_folder(
    folder: Path,
    groups: Sequence[Sequence[str]],
    tensors_of: Callable[[Sequence[str]], Mapping[str, Tensor] | None],
    *,
    side_files: Path,
    dtype: torch.dtype,
    value_head: bool = False,
) -> None:
    """Write a Hugging Face folder, one file a group, at most one group in memory.

    Collective: every rank calls it and `tensors_of(names)` for each group; the rank that gets tensors back (the others
    get None) writes. The folder appears under its name only when whole. `side_files`: the folder whose config.json and
    tokenizer are copied. `value_head`: of a critic, as `copy_side_files` tells it.
    """
    folder = Path(folder)
    temporary = folder.with_name(f".{folder.name}.tmp")
    weight_map: dict[str, str] = {}
    for i, names in enumerate(groups):
        tensors = tensors_of(names)
        if tensors is None:
            continue
        if i == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        file = file_name(i, len(groups))
        with atomic_path(temporary / file) as path:
            save_file({name: tensor.cpu() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    if not weight_map:
        return
    if len(groups) > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        write_text_atomically(temporary / INDEX, json.dumps(index, indent=2))
    copy_side_files(side_files, temporary, dtype, value_head=value_head)
    replace_folder(temporary, folder)


def file_name(index: int, count: int) -> str:
    """The name of file `index` (from 0) of `count` files of weights."""
    return SINGLE if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def copy_side_files(source: Path, folder: Path, dtype: torch.dtype | None = None, *, value_head: bool = False) -> None:
    """Copy config.json and tokenizer. With `dtype`, config.json is rewritten if it names another; with `value_head` too
    it tells of a token classifier of one label.

    Raises:
        RunError: `source` has no config.json to name the dtype in.
    """
    for name in SIDE_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if dtype is None:
        return
    config = folder / "config.json"
    if not config.is_file():
        raise RunError(f"{config} is missing: the folder could not be loaded")
    settings = json.loads(config.read_text(encoding="utf-8"))
    key = "torch_dtype" if "torch_dtype" in settings else "dtype"
    changes = {key: str(dtype).removeprefix("torch.")}
    if value_head:
        names = [name.replace("ForCausalLM", "ForTokenClassification") for name in settings.get("architectures") or ()]
        changes |= {"architectures": names, "id2label": {"0": "value"}, "label2id": {"value": 0}}
    if settings | changes != settings:
        settings |= changes
        write_text_atomically(config, json.dumps(settings, indent=2) + "\n")
