"""Collect the wheels that a GPU machine without a network lacks, and check that they are enough.

    python tools/gpu_wheels.py [--output build/gpu-wheels] [--check-only]

The machine has Python 3.12, torch with triton, and what torch needs; requirements/gpu-py312-extra.txt names the rest.
Refused: a wheel for another Python or platform, a requirement that neither the set nor torch's own company meets, and
more than 64 MiB in all.
"""

import argparse
import email
import subprocess
import sys
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename
from packaging.version import Version

ROOT = Path(__file__).parent.parent
REQUIREMENTS = ROOT / "requirements" / "gpu-py312-extra.txt"
LARGEST_TOTAL_BYTES = 64 << 20
LIBC = ("2_28", "2_27", "2_24", "2_17", "2_12", "2_5")  # glibc of the machine, newest first
PLATFORMS = [f"manylinux_{version}_x86_64" for version in LIBC] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
BROUGHT_BY_TORCH = {"torch": "2.11", "triton": "3.6", "filelock": "3.20", "fsspec": "2025.9", "jinja2": "3.1"}
FORBIDDEN = ("torch", "triton", "nvidia")  # name beginnings: these are on the machine, in builds for its card
ENVIRONMENT = {
    "implementation_name": "cpython", "os_name": "posix", "platform_machine": "x86_64", "extra": "",
    "platform_python_implementation": "CPython", "platform_system": "Linux", "python_full_version": "3.12.3",
    "python_version": "3.12", "sys_platform": "linux",
}  # fmt: skip


def download(folder: Path) -> None:
    """Exactly the pinned wheels, without their dependencies; earlier ones are removed first."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.whl"):
        stale.unlink()
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"),
        *("--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"),
        *(part for abi in ("cp312", "abi3", "none") for part in ("--abi", abi)),
        *(part for platform in PLATFORMS for part in ("--platform", platform)),
        *("--dest", str(folder), "--requirement", str(REQUIREMENTS)),
    ]
    subprocess.run(command, check=True, timeout=900, capture_output=True, text=True)


def problems(folder: Path) -> list[str]:
    """What is wrong with the wheels of the folder, one a line; nothing if the machine can install and import them."""
    wheels = sorted(folder.glob("*.whl"))
    pinned = [Requirement(line) for line in REQUIREMENTS.read_text().splitlines() if line and line[0] != "#"]
    have = {name: Version(version) for name, version in BROUGHT_BY_TORCH.items()}
    tags = {*cpython_tags((3, 12), platforms=PLATFORMS), *compatible_tags((3, 12), "cp312", PLATFORMS)}
    found = []
    for wheel in wheels:
        name, version, _, own_tags = parse_wheel_filename(wheel.name)
        have[name] = version
        if name.startswith(FORBIDDEN):
            found.append(f"{wheel.name}: the machine has its own; take it out of {REQUIREMENTS.name}")
        if not own_tags & tags:
            found.append(f"{wheel.name}: not for Python 3.12 on x86-64 Linux")
    for requirement in pinned:
        found += _unmet(requirement, have, REQUIREMENTS.name)
    for wheel in wheels:
        for requirement in _requirements(wheel):
            found += _unmet(requirement, have, wheel.name)
    total = sum(wheel.stat().st_size for wheel in wheels)
    if total > LARGEST_TOTAL_BYTES:
        found.append(f"{total / 2**20:.1f} MiB in all; at most {LARGEST_TOTAL_BYTES >> 20} MiB can be carried")
    return found


def _requirements(wheel: Path) -> list[Requirement]:
    """What the wheel needs on that machine, extras left out."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        message = email.message_from_string(archive.read(metadata).decode())
    every = [Requirement(text) for text in message.get_all("Requires-Dist", [])]
    return [r for r in every if r.marker is None or r.marker.evaluate(ENVIRONMENT)]


def _unmet(requirement: Requirement, have: dict[str, Version], by: str) -> list[str]:
    version = have.get(canonicalize_name(requirement.name))
    if version is None:
        return [f"{by} needs {requirement}, which is not among the wheels; pin it in {REQUIREMENTS.name}"]
    if not requirement.specifier.contains(version, prereleases=True):
        return [f"{by} needs {requirement}; the version at hand is {version}"]
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-wheels")
    parser.add_argument("--check-only", action="store_true", help="check what is there, download nothing")
    options = parser.parse_args()
    if not options.check_only:
        try:
            download(options.output)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as problem:
            told = (problem.stderr or "").strip().splitlines()[-3:] or [str(problem)]
            print(f"pip did not deliver every wheel of {REQUIREMENTS.name}:", *told, sep="\n  ", file=sys.stderr)
            return 1
    found = problems(options.output)
    if found:
        print("\n".join(found), file=sys.stderr)
        return 1
    wheels = list(options.output.glob("*.whl"))
    total = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{len(wheels)} wheels, {total / 2**20:.1f} MiB of {LARGEST_TOTAL_BYTES >> 20}, in {options.output}")
    print(
        "on the GPU machine, in the repository's root:\n"
        "  python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/extra "
        f"{_shown(options.output)}/*.whl\n"
        "  export PYTHONPATH=/tmp/extra:$PWD:$PWD/kernels\n"
        "what to run there, in which order: docs/gpu-machine.md"
    )
    return 0


def _shown(folder: Path) -> Path:
    return folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder


if __name__ == "__main__":
    sys.exit(main())
