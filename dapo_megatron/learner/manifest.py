"""Which checkpoints a run has, and whether their files are still those that were written. No torch.

Nothing of a checkpoint is parsed before its manifest agrees. That shows damage, not origin: the shards' metadata is
pickle, so use only checkpoints that you or yours have written.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from dapo_megatron.errors import RequestError

MANIFEST = "manifest.json"


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def read_state(folder: Path) -> dict:
    """The state.json of a checkpoint."""
    return json.loads((folder / "state.json").read_text())


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step-*/{MANIFEST}"))


def check_manifest(folder: Path) -> None:
    """Compare every file with the manifest before any is parsed.

    Raises:
        RequestError: a file missing, added or changed; names the first.
    """
    if not (folder / MANIFEST).is_file():
        raise RequestError(f"{folder} is not a checkpoint: it has no {MANIFEST}; RUN/checkpoints/step-NNNNNN is one")
    try:
        expected = json.loads((folder / MANIFEST).read_text())
        names = set(expected)
    except (ValueError, TypeError):
        raise RequestError(f"{folder / MANIFEST} is damaged") from None
    found = file_sums(folder)
    for name in sorted(names | set(found)):
        if expected.get(name) != found.get(name):
            what = "is missing" if name not in found else "does not belong" if name not in names else "has changed"
            raise RequestError(f"{folder}: {name} {what} since the checkpoint was written")


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


def file_sums(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Relative name → SHA-256 of every file of a checkpoint but the manifest; those in `known` are not read again."""
    sums = dict(known or {})
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_file() and path.name != MANIFEST and path.suffix != ".tmp" and name not in sums:
            with open(path, "rb") as handle:
                sums[name] = hashlib.file_digest(handle, "sha256").hexdigest()
    return sums
