"""`dapo-megatron convert`: check the request, write file after file, read everything again, publish."""

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from dapo_megatron.config import Architecture, Layout, derive_layout
from dapo_megatron.config.load import build_recipe
from dapo_megatron.conversion.options import DTYPES, Options, check_request
from dapo_megatron.conversion.progress import counting, memory_bytes
from dapo_megatron.conversion.sources import Source, open_hugging_face, open_megatron
from dapo_megatron.conversion.streams import hashed_file
from dapo_megatron.conversion.targets import HuggingFaceTarget, MegatronTarget, Target, source_stamp
from dapo_megatron.conversion.verify import verify
from dapo_megatron.conversion.workspace import Workspace, finished_bytes, open_workspace
from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.learner.manifest import CRITIC, POLICY, REFERENCE, SURPLUS, check_manifest
from dapo_megatron.resharding.precision import EXPONENT_BITS

SMALL_FILES_BYTES = 64 << 20  # tokenizer, metadata, journal


def convert(
    kind: str, source_folder: Path, destination: Path, overrides: Sequence[str] = (), options: Options | None = None
) -> None:
    """Write `destination` from `source_folder`; `kind` is one of KINDS.

    Overrides are `parallel.*` settings: the layout of a Megatron destination. The destination appears whole or not at
    all; an interrupted conversion goes on when the same call is made again. Prints what was reused, verified and
    measured, and at last the destination.

    Raises:
        RequestError: a source that is damaged or does not fit its config.json, a destination that exists, a layout that
            does not divide, a dtype that would lose range, too little room on the disk; nothing has been written.
        RunError: a disk that is full after all, a file that changed meanwhile, a result that does not verify.
    """
    started = time.perf_counter()
    options = options or Options()
    check_request(kind, source_folder, destination, overrides, options)
    torch.set_num_threads(1)  # copies are bound by memory and disk
    from_megatron, to_megatron = (side == "megatron" for side in kind.split("-to-"))
    if from_megatron:
        check_manifest(source_folder)
    part = CRITIC if options.critic else POLICY
    source = open_megatron(source_folder, part) if from_megatron else open_hugging_face(source_folder)
    dtype = _target_dtype(source, source_folder, options)
    carried = bool(source.optimizer_tensors) and to_megatron and not options.weights_only
    if carried and [dtype] != source.dtypes:
        raise RequestError(
            f"--dtype {options.dtype} would part the weights from their optimizer state; add --weights-only to leave "
            "the state behind, or keep the dtype"
        )
    # a piece is counted in the wider of the two dtypes
    widest = max(d.itemsize for d in (dtype, *source.dtypes))
    piece_bytes = max(1, options.piece_bytes * dtype.itemsize // widest)
    target: Target
    if to_megatron:
        layout = _layout(source.architecture, source.side_files, destination, overrides)
        folder = source_folder if from_megatron else None
        target = MegatronTarget(source, layout, dtype, piece_bytes=piece_bytes, source_folder=folder, optimizer=carried)
    else:
        target = HuggingFaceTarget(source, dtype, file_size=options.file_size, piece_bytes=piece_bytes)
    request = {
        "kind": kind,
        "source": str(source_folder.resolve()),
        "stamp": source_stamp(source, source_folder if from_megatron else None),
        "dtype": str(dtype),
        "settings": [*overrides] if to_megatron else options.file_size,
        "piece_bytes": piece_bytes,
        "optimizer": carried,
        "part": part,
    }
    _check_room(destination, target, request)
    if source.optimizer_tensors:
        print(_optimizer_line(source, carried=carried, to_megatron=to_megatron))
    if from_megatron and (source_folder / SURPLUS).exists():
        print("groups kept for the next step are left behind")
    if options.critic:
        print("the critic alone is converted, into a token classifier of one label")
    elif from_megatron and (source_folder / CRITIC).exists():
        print("the critic is left behind")
    if from_megatron and (source_folder / REFERENCE).exists():
        print("the reference policy is left behind")
    with open_workspace(destination, request) as workspace:
        _tell_reuse(workspace, target)
        _write_files(target, workspace, destination)
        target.finish(workspace)
        if options.verify:
            _verify(source, target, workspace, dtype, options.piece_bytes)
        total = sum(path.stat().st_size for path in workspace.content.rglob("*") if path.is_file())
        workspace.publish()
    seconds = time.perf_counter() - started
    peak = memory_bytes()
    memory = f"; peak memory {peak / (1 << 20):.0f} MiB" if peak else ""
    print(f"wrote {total} bytes in {seconds:.1f} s, {total / 1e6 / seconds:.0f} MB/s{memory}")
    print(destination)


def _target_dtype(source: Source, folder: Path, options: Options) -> torch.dtype:
    name = DTYPES[options.dtype]
    if name is None:
        if len(source.dtypes) != 1:
            held = ", ".join(str(dtype).removeprefix("torch.") for dtype in source.dtypes)
            raise RequestError(f"{folder} holds tensors of dtype {held}; choose one with --dtype")
        return source.dtypes[0]
    dtype = getattr(torch, name)
    for tensor_name, tensor in source.weights.items():
        if EXPONENT_BITS[tensor.dtype] > EXPONENT_BITS[dtype] and not options.allow_loss:
            held = str(tensor.dtype).removeprefix("torch.")
            raise RequestError(
                f"--dtype {options.dtype} would lose range: {tensor_name} is {held}, which reaches "
                f"{torch.finfo(tensor.dtype).max:.3g}, and {name} only {torch.finfo(dtype).max:.3g}; use bf16, or add "
                "--allow-loss to let larger numbers become infinite"
            )
    return dtype


def _layout(a: Architecture, side_files: Path, destination: Path, overrides: Sequence[str]) -> Layout:
    settings = {"run": {"directory": str(destination), "steps": 0}, "model": {"path": str(side_files)}}
    return derive_layout(build_recipe(settings, overrides), a)


def _check_room(destination: Path, target: Target, request: dict) -> None:
    parent = next(path for path in destination.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise RequestError(f"{destination} cannot be made: {parent} is no folder that may be written to")
    needed = sum(file.bytes for file in target.files) + SMALL_FILES_BYTES - finished_bytes(destination, request)
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise RequestError(f"{destination} needs {needed} bytes and {parent} has {free} free; make room first")


def _optimizer_line(source: Source, *, carried: bool, to_megatron: bool) -> str:
    count = len(source.optimizer_tensors)
    if carried:
        return f"optimizer state is carried over ({count} tensors)"
    why = "--weights-only" if to_megatron else "a Hugging Face folder has no place for it"
    return f"optimizer state is left behind ({count} tensors): {why}"


def _tell_reuse(workspace: Workspace, target: Target) -> None:
    if workspace.finished:
        print(
            f"reuses {len(workspace.finished)} of {len(target.files)} files, {workspace.bytes_finished} bytes, from "
            "an interrupted conversion"
        )


def _write_files(target: Target, workspace: Workspace, destination: Path) -> None:
    todo = [i for i, file in enumerate(target.files) if file.name not in workspace.finished]
    with counting("write", sum(target.files[i].bytes for i in todo)) as counter:
        for i in todo:
            name = target.files[i].name
            path = workspace.content / name
            path.parent.mkdir(exist_ok=True)
            with hashed_file(path, needed=target.files[i].bytes, shown=destination / name) as file:
                more = target.write(i, file, counter.advance)
            workspace.record(name, bytes=file.bytes, sha256=file.sha256, **more)


def _verify(source: Source, target: Target, workspace: Workspace, dtype: torch.dtype, piece_bytes: int) -> None:
    result = target.open(workspace.content)
    try:
        with counting("verify", sum(file.bytes for file in target.files)) as counter:
            count = verify(source, result, dtype=dtype, piece_bytes=piece_bytes, on_bytes=counter.advance)
    except RunError:
        workspace.discard()  # a new attempt must not build on it
        raise
    finally:
        result.files.close()
    print(f"verified {count} tensors")
