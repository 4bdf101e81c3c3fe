"""What `make gpu-wheels` refuses, on wheels made here; nothing is downloaded."""

import importlib
import os
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    module = importlib.import_module("gpu_wheels")
    monkeypatch.setattr(module, "REQUIREMENTS", tmp_path / "extra.txt")
    return module


def wheel(folder: Path, file: str, *requires: str, padding: int = 0) -> None:
    name, version = file.split("-")[:2]
    lines = [f"Name: {name}", f"Version: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    with zipfile.ZipFile(folder / file, "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n\n")
        archive.writestr("data", b"\0" * padding)


def test_a_complete_set_passes(tool, tmp_path):
    tool.REQUIREMENTS.write_text("# pinned\nalpha==1.0\nbeta_two==2.0\n")
    wheel(tmp_path, "alpha-1.0-cp312-cp312-manylinux_2_17_x86_64.whl", "beta-two>=1", "torch>=2.6", 'x; extra == "dev"')
    wheel(tmp_path, "beta_two-2.0-py3-none-any.whl", 'tomli; python_version < "3.11"')
    assert tool.problems(tmp_path) == []


@pytest.mark.parametrize(
    ("file", "requires", "message"),
    [
        ("alpha-1.0-py3-none-any.whl", ["gamma"], "needs gamma, which is not among the wheels"),
        ("alpha-1.0-py3-none-any.whl", ["torch>=2.13"], "needs torch>=2.13; the version at hand is 2.11"),
        ("alpha-1.1-py3-none-any.whl", [], "needs alpha==1.0; the version at hand is 1.1"),
        ("alpha-1.0-cp311-cp311-manylinux_2_17_x86_64.whl", [], "not for Python 3.12"),
        ("alpha-1.0-cp312-cp312-macosx_11_0_arm64.whl", [], "not for Python 3.12"),
        ("nvidia_cublas-1.0-py3-none-any.whl", [], "the machine has its own"),
    ],
)
def test_what_would_not_work_there_is_named(tool, tmp_path, file, requires, message):
    tool.REQUIREMENTS.write_text("alpha==1.0\n" if file.startswith("alpha") else "")
    wheel(tmp_path, file, *requires)
    assert [line for line in tool.problems(tmp_path) if message in line], tool.problems(tmp_path)


def test_more_than_can_be_carried_is_refused(tool, tmp_path, monkeypatch, capsys):
    tool.REQUIREMENTS.write_text("alpha==1.0\n")
    wheel(tmp_path, "alpha-1.0-py3-none-any.whl", padding=3 << 20)
    assert tool.problems(tmp_path) == []
    monkeypatch.setattr(tool, "LARGEST_TOTAL_BYTES", 2 << 20)
    monkeypatch.setattr(sys, "argv", ["gpu_wheels.py", "--check-only", "--output", str(tmp_path)])
    assert tool.main() == 1
    assert "3.0 MiB in all; at most 2 MiB" in capsys.readouterr().err


def test_the_pins_of_the_repository_leave_out_what_the_machine_has():
    names = [line.split("==")[0] for line in (ROOT / "requirements" / "gpu-py312-extra.txt").read_text().splitlines()]
    assert {"megatron-core", "liger-kernel", "pydantic", "hypothesis", "pytest"} <= set(names)
    assert not [name for name in names if name.startswith(("torch", "triton", "nvidia"))]


def test_what_runs_on_a_gpu_imports_with_what_is_carried(tmp_path):
    """In an interpreter that sees the pinned packages and torch's company alone, whatever else is installed here."""
    from tools.gpu_wheels import BROUGHT_BY_TORCH, REQUIREMENTS

    pinned = [line.split("==")[0] for line in REQUIREMENTS.read_text().splitlines() if line and line[0] != "#"]
    company = [*BROUGHT_BY_TORCH, "markupsafe", "networkx", "sympy", "mpmath", "setuptools"]
    there = {canonicalize_name(name) for name in (*pinned, *company)}
    for found in distributions():
        if canonicalize_name(found.name) in there:
            for top in {file.parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
                if not (tmp_path / top).exists():
                    (tmp_path / top).symlink_to(found.locate_file(top))
    tests = "tests.kernels.test_cuda, tests.planning.test_gpu_memory, tests.test_profiler, tools.learner_memory"
    code = f"import bench, bench_learner, learner_peer, {tests}"
    folders = [tmp_path, ROOT, ROOT / "kernels", ROOT / "kernels" / "benchmarks", ROOT / "tools"]
    done = subprocess.run(
        [sys.executable, "-S", "-W", "ignore", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
