"""A slurm of one node on this machine: munged, slurmctld and slurmd, children of this process in a folder of its own.

The node claims four CPUs whatever the machine has. A requeued job waits 6 s instead of 2 minutes.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from dapo_megatron.launch import die_with_parent, free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
FINAL = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
START_LIMIT_S = 60.0
END_LIMIT_S = 45.0

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort={controller_port}
SlurmdPort={node_port}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=2
KillWait=10
PropagatePrioProcess=1
ReturnToService=2
PlugStackConfig=/dev/null
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """Programs of slurm and munge that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@dataclass(frozen=True)
class Slurm:
    """A running slurm: the environment in which sbatch and its like find it."""

    folder: Path
    environment: dict[str, str]

    def state(self, job: str) -> str:
        """JobState of a job, e.g. RUNNING; "unknown" where a busy machine keeps slurm from answering."""
        try:
            told = self._run("scontrol", "show", "job", job, "-o").stdout
        except subprocess.TimeoutExpired:
            return "unknown"
        return dict(field.partition("=")[::2] for field in told.split()).get("JobState", "unknown")

    def wait(self, job: str, limit_s: float) -> str:
        """The final state of a job; fails after `limit_s`."""
        deadline = time.monotonic() + limit_s
        while (state := self.state(job)) not in FINAL:
            assert time.monotonic() < deadline, f"job {job} is {state} after {limit_s} s{self.logs()}"
            time.sleep(0.5)
        return state

    def _run(self, *command: str) -> subprocess.CompletedProcess:
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=30)

    def logs(self) -> str:
        """The last lines of the daemons."""
        told = ""
        for log in sorted(self.folder.glob("*.log")):
            told += f"\n--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        return told


@contextmanager
def running_slurm(folder: Path) -> Iterator[Slurm]:
    """Start slurm in `folder`, whose path must be short (sockets), and end it with all its jobs."""
    host = socket.gethostname().split(".")[0]
    folder.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    ports = {"controller_port": free_port(), "node_port": free_port()}
    (folder / "slurm.conf").write_text(CONFIGURATION.format(host=host, folder=folder, **ports))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    slurm = Slurm(folder, {**clean, "SLURM_CONF": str(folder / "slurm.conf")})
    places = {name: f"--{name}-file={folder}/munged.{name}" for name in ("pid", "log", "seed")}
    commands = {
        "munged": ["munged", "-F", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket", *places.values()],
        "slurmctld": ["slurmctld", "-D", "-f", f"{folder}/slurm.conf"],
        "slurmd": ["slurmd", "-D", "-N", "localhost", "-f", f"{folder}/slurm.conf"],
    }
    daemons: list[subprocess.Popen] = []
    try:
        for name, command in commands.items():
            with open(folder / f"{name}.log", "ab") as log:
                daemons.append(
                    subprocess.Popen(
                        command,
                        stdout=log,
                        stderr=log,
                        env=slurm.environment,
                        start_new_session=True,
                        preexec_fn=die_with_parent,
                    )
                )
            if name == "munged":
                _wait_until((folder / "munge.socket").exists, slurm)
        _wait_until(lambda: _node_is_idle(slurm), slurm)
        yield slurm
    finally:
        _end_jobs(slurm)
        for daemon in reversed(daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(timeout=15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        _kill_left_behind(folder)


def _kill_left_behind(folder: Path) -> None:
    """Processes of jobs that slurm did not end in time, known by the configuration in their environment."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get("SLURM_CONF") == str(folder / "slurm.conf"):
                process.kill()


def _wait_until(ready, slurm: Slurm) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while not ready():
        assert time.monotonic() < deadline, f"slurm did not start in {START_LIMIT_S} s{slurm.logs()}"
        time.sleep(0.2)


def _node_is_idle(slurm: Slurm) -> bool:
    return slurm._run("sinfo", "-h", "-o", "%T").stdout.strip() == "idle"


def _end_jobs(slurm: Slurm) -> None:
    """Cancel every job and wait until its steps have left, which outlive slurmd."""
    try:
        subprocess.run(["scancel", "--user=root"], env=slurm.environment, capture_output=True, timeout=20)
        deadline = time.monotonic() + END_LIMIT_S
        while time.monotonic() < deadline:
            left = subprocess.run(["squeue", "-h"], env=slurm.environment, capture_output=True, text=True, timeout=20)
            if left.returncode or not left.stdout.strip():
                return
            time.sleep(0.5)
    except (OSError, subprocess.TimeoutExpired):
        return
