"""What the launcher grants its ranks when one of them fails: small processes in the place of ranks."""

import os
import signal
import subprocess
import sys
import time

import pytest

from dapo_megatron import launch
from dapo_megatron.learner.manifest import checkpoint_under_way

# rank 1 fails once a checkpoint is under way; rank 0 gives it its name so many seconds later
RANK = """
import os, sys, time, pathlib
folder, seconds = pathlib.Path(sys.argv[1]) / "checkpoints", float(sys.argv[2])
growing = folder / ".step-000001.tmp"
if os.environ["RANK"] == "1":
    while not growing.exists():
        time.sleep(0.01)
    sys.exit(3)
growing.mkdir(parents=True)
time.sleep(seconds)
growing.rename(folder / "step-000001")
time.sleep(60)
"""


@pytest.mark.parametrize(("seconds", "limit_s", "whole"), [(1.5, 60.0, True), (30.0, 0.5, False)])
def test_a_failure_leaves_a_checkpoint_under_way_its_time(tmp_path, monkeypatch, capsys, seconds, limit_s, whole):
    monkeypatch.setattr(launch, "FAIL_GRACE_S", 0.3)
    started = time.monotonic()
    code = launch.start_ranks(
        [sys.executable, "-S", "-c", RANK, str(tmp_path), str(seconds)],
        2,
        save_limit_s=limit_s,
        saving=lambda: checkpoint_under_way(tmp_path),
    )
    assert code == 3 and "killing them" in capsys.readouterr().err
    assert os.listdir(tmp_path / "checkpoints") == ["step-000001" if whole else ".step-000001.tmp"]
    assert time.monotonic() - started < 25, "rank 0 was waited for although no checkpoint was under way any more"


def test_a_rank_that_is_killed_is_named_and_the_others_end(monkeypatch, capsys):
    monkeypatch.setattr(launch, "FAIL_GRACE_S", 0.3)
    dies = "import os, signal, time; os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGKILL); time.sleep(60)"
    assert launch.start_ranks([sys.executable, "-S", "-c", dies], 3) == 128 + signal.SIGKILL
    told = capsys.readouterr().err
    assert told.startswith("rank 1 was killed by SIGKILL, as for want of memory; the others end\n")


# as a rank, with a child as a grader's worker or an engine is: slurm's notice comes to both
NOTICED = """
import os, signal, subprocess, sys, time
from dapo_megatron.stop_signals import hold_notice, notice_came
hold_notice()
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; print(1, flush=True); time.sleep(60)"], stdout=-1)
child.stdout.readline()
assert not notice_came()
for process in (os.getpid(), child.pid):
    os.kill(process, signal.SIGUSR1)
time.sleep(0.2)
assert notice_came() and child.poll() is None, child.poll()
child.kill()
"""


@pytest.mark.parametrize("inherited", ["", "trap '' USR1; "])
def test_a_notice_of_the_time_limit_waits_and_ends_no_child(inherited):
    subprocess.run(["bash", "-c", f'{inherited}exec "$0" -c "$1"', sys.executable, NOTICED], check=True, timeout=60)


# ranks that stop at the notice, though not at once
STOPPING = """
import signal, sys, time
def stop(*_):
    time.sleep(0.5)
    sys.exit(138)
signal.signal(signal.SIGUSR1, stop)
print("ready", flush=True)
time.sleep(60)
"""


def test_the_launcher_passes_the_notice_on_and_a_second_one_kills_nobody(tmp_path):
    code = (
        "import sys; from dapo_megatron.launch import start_ranks\n"
        f"sys.exit(start_ranks([sys.executable, '-S', '-c', {STOPPING!r}], 2))"
    )
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        for _ in range(2):
            assert launcher.stdout.readline() == "ready\n"
        for _ in range(2):
            launcher.send_signal(signal.SIGUSR1)
            time.sleep(0.1)
        assert launcher.wait(timeout=30) == 138
    finally:
        launcher.kill()


def test_ranks_are_told_to_stop_though_nobody_reads_the_launchers_words():
    """`train … 2>&1 | tee log` and Ctrl-C: the pipe's reader dies of the same signal."""
    stopping = STOPPING.replace("SIGUSR1", "SIGTERM").replace("sys.exit(138)", "print('told', flush=True); sys.exit(1)")
    code = (
        "import sys; from dapo_megatron.launch import start_ranks\n"
        f"sys.exit(start_ranks([sys.executable, '-S', '-c', {stopping!r}], 2))"
    )
    reads, writes = os.pipe()
    launcher = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=writes, text=True)
    os.close(writes)
    try:
        for _ in range(2):
            assert launcher.stdout.readline() == "ready\n"
        os.close(reads)
        launcher.send_signal(signal.SIGINT)
        launcher.wait(timeout=30)
        assert launcher.stdout.read() == "told\ntold\n"
    finally:
        launcher.kill()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("login1", "login1"),
        ("node[007-012,20],login1", "node007"),
        ("gpu-a[1,3]-ib[0-1].x,b", "gpu-a1-ib0.x"),
        ("a,b", "a"),
    ],
)
def test_the_first_node_of_a_host_list(nodes, first):
    assert launch.first_node(nodes) == first


def test_ranks_of_a_step_meet_on_its_first_node_at_a_port_of_their_own():
    step = {"SLURM_STEP_NODELIST": "n[3-4]", "SLURM_JOB_ID": "7123456", "SLURM_STEP_ID": "0"}
    ports = set()
    for other in ({}, {"SLURM_STEP_ID": "1"}, {"SLURM_JOB_ID": "7123457"}):
        environment = step | other
        launch.name_meeting_point(environment)
        assert environment["MASTER_ADDR"] == "n3"
        ports.add(int(environment["MASTER_PORT"]))
    assert len(ports) == 3 and all(low <= port < high for port in ports for low, high in [launch.PORTS])
    for own in ({"MASTER_ADDR": "m", "MASTER_PORT": "5"}, {"RANK": "0"}):
        environment = step | own
        launch.name_meeting_point(environment)
        assert {"MASTER_ADDR": "n3", "MASTER_PORT": "1"}.items() & environment.items() == set()
        assert environment.get("MASTER_ADDR") == own.get("MASTER_ADDR")
