"""Parts that are known not to go together. What the installed parts say of each other counts; a table of our own holds
only what none of them says."""

from collections.abc import Iterator
from dataclasses import dataclass

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from dapo_megatron.doctor.facts import PACKAGES, Facts

# NVIDIA, "CUDA Toolkit Release Notes", table of the least driver for CUDA minor version compatibility (Linux x86_64);
# "CUDA Compatibility", page "Minor Version Compatibility", table 1 has the same branches: 450, 525, 580
LEAST_DRIVER = {11: (450, 80, 2), 12: (525, 60, 13), 13: (580, 0, 0)}
CUDA_CORES = {"transformer-engine-cu12": 12, "transformer-engine-cu13": 13}


@dataclass(frozen=True)
class Pair:
    """`names` do not go together; `grave`: a run fails or computes something else, else it loses something."""

    names: tuple[str, ...]
    text: str
    grave: bool = True


def bad_pairs(facts: Facts) -> list[Pair]:
    """Every pair found on the machine."""
    return [*_declared(facts), *_te_range(facts), *_te_core(facts), *_flash(facts), *_driver(facts)]


def _declared(facts: Facts) -> Iterator[Pair]:
    """Requires-Dist of one package against the version of another; extras and what is not installed are left out."""
    shown = {canonicalize_name(d): name for name, names in PACKAGES.items() for d in names}
    for name, lines in facts.requires.items():
        for requirement in _requirements(lines):
            other = shown.get(canonicalize_name(requirement.name))
            version = other and facts.packages[other]
            if not version or "extra" in str(requirement.marker or ""):
                continue
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            if not requirement.specifier.contains(version, prereleases=True):
                own = facts.packages.get(name)
                who = f"{name} {own}" if own else name
                text = f"{who} says that it needs {other} {requirement.specifier}; {version} is installed"
                yield Pair((name, other), text)


def _te_range(facts: Facts) -> Iterator[Pair]:
    """megatron-core names the TransformerEngine it was written against in its extra `dev`."""
    version = facts.packages["TransformerEngine"]
    if version is None:
        return
    for requirement in _requirements(facts.requires.get("megatron-core", ())):
        named = canonicalize_name(requirement.name) == "transformer-engine"
        if not named or requirement.marker is None or not requirement.marker.evaluate({"extra": "dev"}):
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            yield Pair(
                ("megatron-core", "TransformerEngine"),
                f"megatron-core {facts.packages['megatron-core']} was written against TransformerEngine "
                f"{requirement.specifier}; {version} is installed: run `dapo-megatron doctor --parity`",
                grave=False,
            )


def _te_core(facts: Facts) -> Iterator[Pair]:
    """TransformerEngine's libraries are linked against one major version of CUDA, torch against one."""
    if facts.torch_cuda is None:
        return
    major = int(facts.torch_cuda.split(".")[0])
    for core in facts.te_cores:
        if CUDA_CORES[core] != major:
            text = f"{core} is linked against CUDA {CUDA_CORES[core]}, torch against CUDA {facts.torch_cuda}"
            yield Pair(("torch", "TransformerEngine"), text)


def _flash(facts: Facts) -> Iterator[Pair]:
    """TransformerEngine ignores a FlashAttention newer than its source names."""
    version, newest = facts.packages["FlashAttention"], facts.flash_newest
    if version is None or newest is None:
        return
    try:
        later = Version(version) > Version(newest)
    except InvalidVersion:
        return
    if later:
        yield Pair(
            ("TransformerEngine", "FlashAttention"),
            f"TransformerEngine {facts.packages['TransformerEngine']} ignores FlashAttention later than {newest}; "
            f"{version} is installed, so attention takes another backend",
            grave=False,
        )


def _driver(facts: Facts) -> Iterator[Pair]:
    if facts.torch_cuda is None or facts.driver is None:
        return
    least = LEAST_DRIVER.get(int(facts.torch_cuda.split(".")[0]))
    found = tuple(int(part) for part in facts.driver.split(".") if part.isdigit())
    if least is not None and found < least:
        wanted = ".".join(map(str, least)) if any(least[1:]) else str(least[0])
        text = f"torch's CUDA {facts.torch_cuda} needs a driver of {wanted} or later; this one is {facts.driver}"
        yield Pair(("torch", "driver"), text)


def _requirements(lines) -> Iterator[Requirement]:
    for line in lines:
        try:
            yield Requirement(line)
        except InvalidRequirement:
            continue
