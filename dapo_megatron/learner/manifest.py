"""Which checkpoints a run has, and whether their files are still those that were written. No torch.

Nothing of a checkpoint is parsed before its manifest agrees. That shows damage, not origin: the shards' metadata is
pickle, so use only checkpoints that you or yours have written.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dapo_megatron.errors import RequestError
from dapo_megatron.files import write_text_atomically

MANIFEST = "manifest.json"
BEST = "best.json"
POLICY = "shards"  # the folder of its shards
CRITIC = "critic"
REFERENCE = "reference"  # one that moves
UPDATES = {POLICY: "updates", CRITIC: "critic_updates"}  # where state.json counts them
SURPLUS = "surplus.safetensors"  # groups kept for the next step
HASHING_THREADS = 8
_NAME = re.compile(r"step-(\d{6,})")


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def temporary_folder(folder: Path) -> Path:
    """Where a checkpoint grows before it gets its name."""
    return folder.with_name(f".{folder.name}.tmp")


def checkpoint_under_way(run: Path) -> bool:
    """Whether a checkpoint is growing, or one killed while it grew is left."""
    return any((run / "checkpoints").glob(".step-*.tmp"))


def read_state(folder: Path) -> dict:
    """The state.json of a checkpoint."""
    return json.loads((folder / "state.json").read_text())


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders with the name of a checkpoint, sound or not, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def write_manifest(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Write the manifest of a folder that has all its other files; sums in `known` are taken as they are."""
    write_text_atomically(folder / MANIFEST, _manifest_text(file_sums(folder, known)))


def check_manifest(folder: Path) -> None:
    """Compare every file with the manifest, and the manifest with its own sum, before anything else is parsed.

    Raises:
        RequestError: a file missing, added or changed; names the first.
    """
    if not (folder / MANIFEST).is_file():
        raise RequestError(f"{folder} is not a checkpoint: it has no {MANIFEST}; RUN/checkpoints/step-NNNNNN is one")
    expected = _read_manifest(folder / MANIFEST)
    there = _names(folder)
    for name in sorted(set(expected) ^ there):
        what = "is missing" if name in expected else "does not belong"
        raise RequestError(f"{folder}: {name} {what} since the checkpoint was written")
    special = [name for name in sorted(there) if not (folder / name).is_file()]  # a pipe would never end
    try:
        found = {} if special else file_sums(folder)
    except OSError as error:
        raise RequestError(f"{folder}: {error.filename} cannot be read: {error.strerror}") from None
    for name in special or sorted(there):
        if expected[name] != found.get(name):
            raise RequestError(f"{folder}: {name} has changed since the checkpoint was written")


def newest_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that agrees with its manifest, and one line for each damaged one that was passed over."""
    skipped = []
    for folder in reversed(list_checkpoints(run / "checkpoints")):
        try:
            check_manifest(folder)
        except RequestError as error:
            skipped.append(f"skipped a damaged checkpoint: {error}")
            continue
        return folder, skipped
    return None, skipped


def tidy_up(run: Path) -> None:
    """What a killed run left half done: folders that never became checkpoints go, one caught between two names gets its
    own back."""
    for aside in (run / "checkpoints").glob(".step-*.replaced"):
        folder = aside.with_name(aside.name.removeprefix(".").removesuffix(".replaced"))
        if folder.exists():
            shutil.rmtree(aside)
        else:
            aside.rename(folder)
    for temporary in (run / "checkpoints").glob(".step-*.tmp"):
        shutil.rmtree(temporary)


def set_aside_later(chosen: Path) -> None:
    """Rename the damaged checkpoints of later steps than `chosen`: they must not count among those to keep."""
    for folder in list_checkpoints(chosen.parent):
        if int(folder.name.removeprefix("step-")) > int(chosen.name.removeprefix("step-")):
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)


def prune(folder: Path, *, keep: int, best: int | None) -> None:
    """Delete all but the newest `keep` checkpoints and that of step `best`, which best.json then names.

    Called when the newest of them has just been written, so a sound one is always left.
    """
    there = list_checkpoints(folder)
    spared = None if best is None else checkpoint_folder(folder.parent, best)
    for old in there[:-keep]:
        if old != spared:
            shutil.rmtree(old)
    if spared in there:
        write_text_atomically(folder / BEST, json.dumps({"step": best, "folder": spared.name}) + "\n")
    else:
        (folder / BEST).unlink(missing_ok=True)


def file_sums(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Relative name → SHA-256 of every file of a checkpoint but the manifest; those in `known` are not read again."""
    sums = dict(known or {})
    missing = sorted(_names(folder) - set(sums))

    def digest(name: str) -> str:
        with open(folder / name, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()

    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        sums.update(zip(missing, threads.map(digest, missing), strict=True))
    return sums


def _names(folder: Path) -> set[str]:
    """Everything in a checkpoint that is not a folder, but for the manifest."""
    names = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()}
    return names - {MANIFEST}


def _manifest_text(sums: Mapping[str, str]) -> str:
    files = dict(sorted(sums.items()))
    own = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    return json.dumps({"files": files, "sha256": own}, indent=2) + "\n"


def _read_manifest(path: Path) -> dict[str, str]:
    """The sums of a manifest in which no byte has changed."""
    text = path.read_bytes()
    try:
        sums = json.loads(text)["files"]
        if _manifest_text(sums).encode() == text:
            return sums
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise RequestError(f"{path.parent}: {path.name} has changed since the checkpoint was written")
