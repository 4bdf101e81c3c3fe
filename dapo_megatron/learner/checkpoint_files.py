"""The files of a checkpoint: every rank writes and hashes its own, rank 0 adds what is common and gives it its name.

    checkpoints/step-000010/
        shards/        model and optimizer, loadable at another TP/PP/DP
        critic/        those of a critic, if there is one; with hf/ of its own if it began from another folder
        reference/     weights of a reference policy that moves, if there is one
        random/        states of each rank's random number generators
        hf/            config.json and tokenizer, so that the folder can be converted alone
        surplus.safetensors   groups kept for the next step, if any
        state.json     where the run stands: steps, updates, place in the prompt order, best validation, layout, dtype,
                       settings that kept groups depend on
        manifest.json  SHA-256 of every other file and of itself: nothing is parsed before it agrees

A checkpoint is written beside its final name, flushed to disk and renamed, so one that is there is whole.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

from dapo_megatron.data.completions import PromptGroup
from dapo_megatron.data.group_files import load_groups, save_groups
from dapo_megatron.errors import RunError
from dapo_megatron.files import FULL, HashedFile, replace_folder, sync_path, sync_tree, write_text_atomically
from dapo_megatron.learner.manifest import SURPLUS, temporary_folder, write_manifest
from dapo_megatron.learner.random_states import RandomStates, random_states_bytes
from dapo_megatron.resharding.hf_files import copy_side_files

COMMON = "common.pt"
BACKEND = CheckpointingConfig("torch_dist", 1)


@dataclass(frozen=True)
class Content:
    """What a checkpoint at `folder` is to hold. builds: folder of shards → as `take_snapshot` returns it; side_files:
    folder for config.json and tokenizer → the Hugging Face folder that they come from."""

    folder: Path
    builds: Mapping[str, Callable[[], dict]]
    state: dict
    random: RandomStates
    groups: Sequence[PromptGroup]
    side_files: Mapping[str, Path]


@dataclass
class _Share:
    """What a rank has written: of each folder of shards its plan and where each item lies; sums by name; or why it
    could not."""

    plans: dict[str, SavePlan] = field(default_factory=dict)
    results: dict[str, list[WriteResult]] = field(default_factory=dict)
    sums: dict[str, str] = field(default_factory=dict)
    error: str | None = None


def random_states_file(folder: Path, rank: int) -> Path:
    return folder / "random" / f"rank-{rank:05d}.safetensors"


def load_surplus(folder: Path) -> list[PromptGroup]:
    """The groups that a checkpoint keeps for the next step."""
    return load_groups(folder / SURPLUS) if (folder / SURPLUS).exists() else []


def write_checkpoint(content: Content, group: dist.ProcessGroup) -> None:
    """Write it; collective over `group`, all ranks on gloo. Rank 0 returns when the checkpoint has its name, others
    when their share is written.

    Raises:
        RunError: a file could not be written, here or, on rank 0, on any rank; nothing is left then.
    """
    temporary, rank = temporary_folder(content.folder), dist.get_rank()
    refusal: list[str | None] = [None]
    if rank == 0:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            for name in (*content.builds, "random", *content.side_files):
                (temporary / name).mkdir(parents=True)
        except OSError as error:
            refusal = [_why(error, content.folder)]
    dist.broadcast_object_list(refusal, src=0, group=group)  # `builds` must not wait for a rank that never calls them
    share, common = _Share(error=refusal[0]), {}
    try:
        if refusal[0] is None:
            share, common = _write_share(content, temporary, rank)
    except Exception as error:  # whatever it is, the others wait to hear of it
        share.error = _why(error, content.folder)
    shares: list[_Share | None] = [None] * dist.get_world_size(group)
    dist.gather_object(share, shares if rank == 0 else None, dst=0, group=group)
    if rank != 0:
        if share.error is not None:
            raise RunError(share.error)
        return
    try:
        failed = next((s.error for s in shares if s.error is not None), None)
        if failed is not None:
            raise RunError(failed)
        _complete(content, temporary, shares, common)
    except Exception as error:
        raise RunError(_why(error, content.folder)) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_share(content: Content, temporary: Path, rank: int) -> tuple[_Share, dict]:
    """This rank's files; with them, for each folder of shards, what of the state has none."""
    share = _Share()
    common = {part: _write_shards(build(), temporary, part, rank, share) for part, build in content.builds.items()}
    with _hashed(random_states_file(temporary, rank), share.sums, temporary) as file:
        file.write(random_states_bytes(content.random))
    return share, common


def _write_shards(state: dict, temporary: Path, part: str, rank: int, share: _Share) -> dict:
    """This rank's file of one folder of shards, told in `share`; returns what of the state has no shards."""
    sharded, common = save_preprocess(state, validate_access_integrity=False)
    flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, True)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(flat), is_coordinator=rank == 0)
    plan = share.plans[part] = planner.create_local_plan()
    results = share.results[part] = []
    name = f"__{rank}_0.distcp"
    with _hashed(temporary / part / name, share.sums, temporary) if plan.items else nullcontext() as file:
        for item in plan.items:
            start = file.tell()
            data = planner.resolve_data(item)
            if isinstance(data, Tensor):
                torch.save(_alone(data), file)
            else:
                file.write(data.getbuffer())
            length = file.tell() - start
            results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
    return common


def _complete(content: Content, temporary: Path, shares: Sequence[_Share], common: dict) -> None:
    """Rank 0: everything that is written once, the manifest last, then the name."""
    sums = {name: value for share in shares for name, value in share.sums.items()}
    for part in content.builds:
        shards = temporary / part
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.set_up_planner({}, is_coordinator=True)
        _, metadata = planner.create_global_plan([share.plans[part] for share in shares])  # refuses holes and overlaps
        FileSystemWriter(shards).finish(metadata, [share.results[part] for share in shares])
        with _hashed(shards / COMMON, sums, temporary) as file:
            torch.save(common[part], file)
        save_config(BACKEND, str(shards))
    for name, folder in content.side_files.items():
        copy_side_files(folder, temporary / name)
    write_text_atomically(temporary / "state.json", json.dumps(content.state, indent=2))
    if content.groups:
        save_groups(temporary / SURPLUS, content.groups)
    write_manifest(temporary, sums)
    sync_tree(temporary)
    replace_folder(temporary, content.folder)
    sync_path(content.folder.parent)


@contextmanager
def _hashed(path: Path, sums: dict[str, str], root: Path) -> Iterator[HashedFile]:
    """A file to write to; its sum is added to `sums` under its name below `root`. Raises what the disk said."""
    file = HashedFile(path)
    try:
        yield file
        file.sync()
        sums[str(path.relative_to(root))] = file.sha256
    except RuntimeError as error:
        raise file.failure or error from None
    finally:
        file.close()


def _alone(tensor: Tensor) -> Tensor:
    """On the CPU, in storage of its own: torch.save writes the whole of a shared one."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize else tensor.clone()


def _why(error: Exception, folder: Path) -> str:
    told = f"checkpoint {folder.name} could not be written: "
    if isinstance(error, RunError):
        return str(error)
    if isinstance(error, OSError) and error.errno in FULL:
        place = next(path for path in folder.absolute().parents if path.exists())
        free = f"{shutil.disk_usage(place).free} bytes are free in {place}"
        return f"{told}{error.strerror} ({free}); make room and continue with --resume"
    return told + " ".join(f"{type(error).__name__} {error}".split())
