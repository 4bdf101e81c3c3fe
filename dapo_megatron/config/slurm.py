"""Section `slurm`: the nodes that `dapo-megatron submit` asks for. What follows from it is in slurm/placement.py."""

from typing import Literal

from pydantic import Field

from dapo_megatron.config.section import Section


class Slurm(Section):
    """A job of nodes x ranks a node. That product is the world: tensor x pipeline x context must divide it."""

    nodes: int | None = Field(None, ge=1)
    """Nodes of the job; null = as many as hold parallel.world, 1 without it."""

    gpus_per_node: int | None = Field(None, ge=0)
    """GPUs of a node; null = hardware.gpus_per_node or a smaller parallel.world, and none with learner.device=cpu."""

    tasks_per_node: int | None = Field(None, ge=1)
    """Ranks of a node; null = a rank a GPU, without GPUs the learner's ranks spread over the nodes."""

    cpus_per_task: int | None = Field(None, ge=1)
    """CPU cores of a rank; null = the cluster's default."""

    memory: str | None = None
    """Memory of a node as slurm writes it ("900G"; "0" = all of it); null = the cluster's default."""

    exclusive: bool = True
    """No other job on these nodes."""

    time_limit: str = "24:00:00"
    """Longest time of the job: "hours:minutes:seconds" or "days-hours:minutes:seconds"."""

    stop_before_s: int = Field(1200, ge=1, le=65535)
    """Seconds before the time limit at which slurm tells the job, at times a minute earlier; the step under way, a
    checkpoint and the requeue must fit in."""

    requeue: bool = True
    """Whether a job that came to its time limit, lost a node or failed is queued again and goes on with --resume."""

    most_restarts: int = Field(100, ge=0)
    """Restarts after which a job does not go on, whatever it was that ended it."""

    failures: int = Field(2, ge=0)
    """Failures in a row, without a new checkpoint between them, after which a job is still queued again; 0 = a failure
    ends it. Wrong requests, and stops that would only come again, always do."""

    partition: str | None = None
    """Partition; null = the cluster's default, here and in the next four."""

    account: str | None = None
    """Account that pays."""

    qos: str | None = None
    """Quality of service."""

    reservation: str | None = None
    """Reservation."""

    constraint: str | None = None
    """Features that nodes must have."""

    options: list[str] = Field(default_factory=list)
    """Further options of sbatch, e.g. `--mail-type=END`."""

    launcher: Literal["srun", "torchrun"] = "srun"
    """srun = a task a rank; torchrun = a task a node, which starts the node's ranks."""

    container_image: str | None = None
    """Image for `srun --container-image` (pyxis), built from docker/Dockerfile; null = the nodes' own environment."""

    container_mounts: list[str] = Field(default_factory=list)
    """Further folders, SOURCE:TARGET; the working directory is always mounted, in its own place."""

    setup: list[str] = Field(default_factory=list)
    """Lines of shell run first, on the first node, e.g. `module load cuda`; what they export reaches every rank."""

    environment: list[str] = Field(default_factory=list)
    """NAME=value for every rank, after the job's own: NCCL_IB_HCA, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME …"""

    health_check: bool = True
    """Whether GPUs, all-reduce and disk of every node are tried before the run starts."""

    parity_check: bool = True
    """Whether `doctor --parity` tries the first node's stack before the run starts; a part that fails ends the job. Not
    repeated after a requeue on the same nodes."""

    parity_limit_s: int = Field(300, ge=1)
    """Longest time of a part of it (seconds); the check as a whole gets six times as much."""

    least_gb_per_s: float = Field(0.0, ge=0)
    """Least all-reduce bus bandwidth that the health check accepts, of a node alone and of all together (GB/s)."""

    least_disk_gb: float = Field(10.0, ge=0)
    """Least free space that every node must see where the run is written (GB)."""
