"""What `doctor` prints: a page for people, or one JSON object (docs/doctor.md)."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from dapo_megatron.doctor.facts import MEMORY_DISKS, NETWORK_DISKS, Facts
from dapo_megatron.doctor.findings import Finding, size, usable
from dapo_megatron.doctor.machine import Disk

SCHEMA = 1
TITLES = {
    "missing": "missing, and needed",
    "bad": "does not work",
    "warning": "may bite",
    "cost": "not here, and what that costs",
}
ABSENT = "-"


def as_json(facts: Facts, findings: list[Finding], recipe: str | None) -> dict[str, Any]:
    """One object of plain values; its keys are those of docs/doctor.md."""
    return {
        "schema": SCHEMA,
        "usable": usable(findings),
        "recipe": recipe,
        "packages": {"Python": facts.python, **facts.packages, "Apex": asdict(facts.apex)},
        "imports": {name: imported.error for name, imported in facts.imports.items()},
        "cuda": {
            "torch": facts.torch_cuda,
            "driver": facts.driver,
            "nccl": facts.nccl,
            "gpus_seen_by_torch": facts.torch_gpus,
            "gpus": [asdict(gpu) for gpu in facts.gpus],
        },
        "infiniband": [asdict(port) for port in facts.ports],
        "machine": {
            "system": facts.system,
            "cores": facts.cores,
            "usable_cores": facts.usable_cores,
            "memory": facts.memory,
            "shm": facts.shm and asdict(facts.shm),
            "run_folder": {"path": facts.run_folder, **(asdict(facts.disk) if facts.disk else {})},
            "limits": dict(facts.limits),
        },
        "findings": [asdict(finding) for finding in findings],
    }


def as_text(facts: Facts, findings: list[Finding], recipe: str | None) -> str:
    """The page."""
    lines = ["found", *(f"  {name:<18}{value}" for name, value in _rows(facts))]
    for kind, title in TITLES.items():
        own = [finding for finding in findings if finding.kind == kind]
        if own:
            lines += ["", title]
        for finding in own:
            wanted = f" (for {finding.needed_by})" if finding.needed_by else ""
            lines.append(f"  {finding.subject}{wanted}: {finding.text}")
            if finding.install:
                lines.append(f"      {finding.install}")
    what = f"for {recipe}" if recipe else "for any run"
    return "\n".join([*lines, "", f"usable {what}: {'yes' if usable(findings) else 'no'}"])


def _rows(facts: Facts) -> Iterator[tuple[str, str]]:
    yield "Python", f"{facts.python}, {facts.system}"
    for name, version in facts.packages.items():
        yield name, version or ABSENT
    kinds = {"nvidia": "NVIDIA's", "unrelated": "not NVIDIA's"}
    apex = facts.apex
    built = " with CUDA extensions" if apex.fused else ""
    yield "Apex", f"{apex.version or 'no version'}, {kinds[apex.kind]}{built}" if apex.kind in kinds else ABSENT
    yield "CUDA of torch", facts.torch_cuda or ABSENT
    yield "NCCL", facts.nccl or ABSENT
    yield "driver", facts.driver or ABSENT
    yield "GPUs", _grouped([f"{gpu.name} ({gpu.memory_mib / 1024:.0f} GiB, sm {gpu.capability})" for gpu in facts.gpus])
    ports = [f"{p.link_layer} {p.gbps:g} Gbit/s {p.state}" for p in facts.ports]
    yield "InfiniBand", _grouped(ports)
    yield "CPU cores", f"{facts.usable_cores} of {facts.cores} for this process"
    yield "memory", size(facts.memory) if facts.memory else ABSENT
    yield "/dev/shm", size(facts.shm.total) if facts.shm else ABSENT
    yield "run folder", f"{facts.run_folder}: {_disk(facts.disk)}"
    yield "limits", ", ".join(f"{name} {_limit(name, value)}" for name, value in facts.limits.items())


def _grouped(items: list[str]) -> str:
    return ", ".join(f"{items.count(item)} x {item}" for item in dict.fromkeys(items)) or ABSENT


def _disk(disk: Disk | None) -> str:
    if disk is None:
        return ABSENT
    place = "network" if disk.kind in NETWORK_DISKS else "memory" if disk.kind in MEMORY_DISKS else "local"
    return f"{disk.kind} ({place}), {size(disk.free)} free of {size(disk.total)}"


def _limit(name: str, value: int | None) -> str:
    if value is None:
        return "unknown"
    return "unlimited" if value == -1 else size(value) if name == "memlock" else str(value)
