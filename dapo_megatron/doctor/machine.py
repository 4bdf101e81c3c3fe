"""The only door from the probes to the machine: every question they may ask, so that a test can answer in its place."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

IMPORT_LIMIT_S = 180.0  # of the child that imports what is installed; a cold disk is slow
COMMAND_LIMIT_S = 20.0  # nvidia-smi on a node with a sick GPU does not come back
LIMITS = {"nofile": resource.RLIMIT_NOFILE, "memlock": resource.RLIMIT_MEMLOCK, "nproc": resource.RLIMIT_NPROC}

# imported in a process of its own, in this order: an extension built for another torch may abort it. Each finding is
# told at once, so that an abort costs one answer.
_IMPORTS = """
import importlib, json, os, sys
tell = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
def torch_facts(torch):
    cuda = torch.version.cuda
    facts = {"version": torch.__version__, "cuda": cuda, "gpus": 0, "nccl": None}
    if cuda and torch.cuda.is_available():
        facts["gpus"], facts["nccl"] = torch.cuda.device_count(), ".".join(map(str, torch.cuda.nccl.version()))
    return facts
for name in sys.argv[1:]:
    tell.write(json.dumps([name, "began", None]) + "\\n")
    try:
        module = importlib.import_module(name)
        answer = [name, None, torch_facts(module) if name == "torch" else None]
    except BaseException as error:
        answer = [name, f"{type(error).__name__}: {error}"[:300], None]
    tell.write(json.dumps(answer) + "\\n")
"""


@dataclass(frozen=True)
class Distribution:
    """An installed distribution: its version and what it says it requires (Requires-Dist lines)."""

    version: str
    requires: tuple[str, ...] = ()


@dataclass(frozen=True)
class Disk:
    """The file system that holds a folder: its type as the kernel calls it, bytes in all, bytes free."""

    kind: str
    total: int
    free: int


@dataclass(frozen=True)
class Imported:
    """What importing a module came to: None, or the error in a line; `facts` only of torch."""

    error: str | None
    facts: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Machine:
    """Questions to a machine. Nothing here imports what it asks about; `imports` does so in another process.

    distribution: name → what is installed. find: module → its folder or file. read: path → text of a small file.
    listing: path → names in a folder, sorted. run: command → its output. imports: modules → what became of them.
    disk: path → its file system, of the nearest folder that exists. limit: name in LIMITS → soft limit, -1 = none.
    All answer None (`listing`: nothing) where there is no answer.
    """

    python: str
    system: str
    cores: int
    usable_cores: int
    distribution: Callable[[str], Distribution | None]
    find: Callable[[str], str | None]
    read: Callable[[str], str | None]
    listing: Callable[[str], list[str]]
    run: Callable[[Sequence[str]], str | None]
    imports: Callable[[Sequence[str]], dict[str, Imported]]
    disk: Callable[[str], Disk | None]
    limit: Callable[[str], int | None]


def this_machine() -> Machine:
    """The machine that this process runs on."""
    return Machine(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cores=os.cpu_count() or 1,
        usable_cores=len(os.sched_getaffinity(0)),
        distribution=_distribution,
        find=_find,
        read=_read,
        listing=_listing,
        run=_run,
        imports=_import_elsewhere,
        disk=_disk,
        limit=lambda name: resource.getrlimit(LIMITS[name])[0],
    )


def _distribution(name: str) -> Distribution | None:
    try:
        found = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    return Distribution(found.version, tuple(found.requires or ()))


def _find(module: str) -> str | None:
    """Of a top-level module: find_spec would import the packages around any other."""
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    return next(iter(spec.submodule_search_locations or ()), spec.origin)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return None


def _listing(path: str) -> list[str]:
    try:
        return sorted(os.listdir(path))
    except OSError:
        return []


def _run(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(list(command), capture_output=True, text=True, timeout=COMMAND_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _import_elsewhere(modules: Sequence[str]) -> dict[str, Imported]:
    """One process for all; after one that aborts it or hangs, a new process for the rest."""
    found: dict[str, Imported] = {}
    left = list(modules)
    while left:
        told, why = _imports_told(left)
        found |= told
        later = [name for name in left if name not in found]
        if later:  # the first of them did it
            found[later[0]] = Imported(why)
        left = later[1:]
    return found


def _imports_told(modules: Sequence[str]) -> tuple[dict[str, Imported], str]:
    """(what was told, why the process did not tell more)."""
    command = [sys.executable, "-c", _IMPORTS, *modules]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        output, _ = child.communicate(timeout=IMPORT_LIMIT_S)
        why = f"importing it ended the process (exit code {child.returncode})"
    except subprocess.TimeoutExpired:
        child.kill()
        output, _ = child.communicate()
        why = f"importing it took more than {IMPORT_LIMIT_S:.0f} s"
    found = {}
    for line in output.splitlines():
        with suppress(ValueError):  # a line cut short
            name, error, facts = json.loads(line)
            if error != "began":
                found[name] = Imported(error, facts)
    return found, why


def _disk(path: str) -> Disk | None:
    place = Path(path).resolve()
    while not place.exists() and place != place.parent:
        place = place.parent
    try:
        usage = shutil.disk_usage(place)
    except OSError:
        return None
    return Disk(_file_system(place, _read("/proc/mounts") or ""), usage.total, usage.free)


def _file_system(place: Path, mounts: str) -> str:
    """The type of the longest mount point that holds `place`."""
    best, kind = "", "unknown"
    for line in mounts.splitlines():
        _, point, found, *_ = line.split()
        point = point.replace("\\040", " ")
        if place.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, found
    return kind
