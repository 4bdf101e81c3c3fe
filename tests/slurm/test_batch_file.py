"""The batch file: what it asks for, and what it does when run, with small scripts in the place of srun and scontrol."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dapo_megatron.config import load_recipe
from dapo_megatron.doctor.parity import PARTS
from dapo_megatron.slurm.batch_file import PARITY_LIMITS, batch_file
from tests.command_line import ROOT
from tools.write_slurm_files import FILES, FOLDER, TWO_NODES, render

TINY = ROOT / "recipes" / "slurm" / "tiny.yaml"
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
ODD = (
    "slurm.setup=['module load \"cuda 12\"', 'export X=\"$HOME\"']",
    "slurm.environment=['NCCL_IB_HCA=^mlx5_1,mlx5_2']",
    "slurm.options=['--mail-type=END']",
    "slurm.container_mounts=['/data:/data']",
    "slurm.container_image=docker://us.er/image:1",
    "slurm.health_check=false",
    "slurm.parity_check=false",
    "slurm.requeue=false",
    "run.name='a name; with blanks'",
)


def text(*overrides: str, recipe: Path | str = TINY, **options: bool) -> str:
    loaded = load_recipe(recipe, overrides)
    return batch_file(loaded, command="test", arguments=[["recipe.yaml"]], **options)


@pytest.mark.parametrize("name", FILES)
def test_the_committed_files_are_what_submit_writes(name):
    committed = (FOLDER / f"{name}.sbatch").read_text(encoding="utf-8")
    assert committed == render(name), "run python tools/write_slurm_files.py"


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(tmp_path):
    for launcher in ("srun", "torchrun"):
        odd = text(*ODD, f"slurm.launcher={launcher}", recipe=ROOT / TWO_NODES, overwrite=True)
        (tmp_path / f"{launcher}.sbatch").write_text(odd)
    files = [*FOLDER.glob("*.sbatch"), *tmp_path.glob("*.sbatch")]
    assert len(files) == len(FILES) + 2
    files.append(ROOT / "tests" / "slurm" / "run.sh")
    found = subprocess.run([SHELLCHECK, *files], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stdout


def test_the_options_come_from_the_recipe():
    lines = text(*ODD, "slurm.nodes=4", "slurm.partition=h100", recipe=ROOT / TWO_NODES).splitlines()
    asked = {line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")}
    assert asked == {
        "job-name=a-name-with-blanks", "output=runs/slurm-two-nodes.slurm/%j.out", "open-mode=append", "nodes=4",
        "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=12", "mem=0", "partition=h100", "time=1-00:00:00",
        "signal=B:USR1@1800", "exclusive", "no-requeue", "mail-type=END",
    }  # fmt: skip
    assert "export NCCL_IB_HCA=^mlx5_1,mlx5_2" in lines and "export CUDA_DEVICE_MAX_CONNECTIONS=1" in lines
    assert '    --container-mounts="$PWD:$PWD,/data:/data"  # paths mean the same inside and outside' in lines
    assert not [line for line in lines if any(word in line for word in ("scontrol requeue", "node_health", "parity"))]
    torchrun = text("slurm.launcher=torchrun", recipe=ROOT / TWO_NODES).splitlines()
    assert {"#SBATCH --ntasks-per-node=1", "#SBATCH --cpus-per-task=96", "    --nproc-per-node=8"} <= set(torchrun)
    assert not [line for line in text().splitlines() if "NCCL" in line or "gpus" in line]


def test_parity_is_one_task_on_the_first_node_with_all_of_its_cores():
    for launcher, tasks in (("srun", "8"), ("torchrun", "1")):
        lines = text("slurm.parity_limit_s=100", f"slurm.launcher={launcher}", recipe=ROOT / TWO_NODES).splitlines()
        assert f"#SBATCH --ntasks-per-node={tasks}" in lines
        words = " ".join(line.strip() for line in lines)
        assert "local one=( --nodes=1 --ntasks=1 --ntasks-per-node=1 --relative=0 --time=10:00 " in words
        (step,) = [line for line in lines if "doctor --parity" in line]
        assert step.endswith(' dapo-megatron doctor --parity "${arguments[@]}" --json --time-limit 100')
        assert "torchrun" not in step
        # of several --cpus-per-task srun takes the last one
        assert [line.split()[0] for line in lines if "--cpus-per-task" in line][-1] == "--cpus-per-task=96"
    assert len(PARTS) + 1 == PARITY_LIMITS


# writes down how it was called; as the launcher of `train` it leaves at USR1 as ranks do
SRUN = """#!/bin/bash
echo "$*" >>calls
case "$*" in
*node_health*) exit "${HEALTH:-0}" ;;
*parity*) out="$(tr ' ' '\n' <<<"$*" | sed -n 's/^--output=//p')"; echo verdict >"$out"; exit "${PARITY:-0}" ;;
esac
[ -n "${EARLY:-}" ] && exit "$EARLY"
mkdir -p run && touch run/config.yaml
[ -n "${FINALLY:-}" ] && echo why >"$DAPO_MEGATRON_FINAL"
[ -n "${QUICK:-}" ] && exit "$QUICK"
trap 'exit 138' USR1
touch training
for _ in {1..300}; do sleep 0.1; done
"""


SCONTROL = """\
#!/bin/bash
if [ "$1" = show ]; then
    echo "JobId=$3 JobState=RUNNING PreemptEligibleTime=2026-11-22T09:24:02 PreemptTime=${PREEMPTED:-None} Comment="
else
    echo "scontrol $*" >>calls
fi
"""


def fails(folder: Path, times: int, *, code: str = "1", restarts: int = 0, **variables: str) -> list[str]:
    """What the last of so many failures in a row said, each in a start of its own."""
    for start in range(times):
        (folder / "calls").unlink(missing_ok=True)
        found, output, calls = run_batch(folder, QUICK=code, SLURM_RESTART_COUNT=str(restarts + start), **variables)
        assert found == int(code)
    trained = next(i for i, call in enumerate(calls) if " train " in call)
    return [*calls[trained + 1 :], *output.splitlines()]


def run_batch(folder: Path, *, overrides: tuple[str, ...] = (), notice: bool = False, **variables: str):
    """(exit code, output, the calls so far) of a batch file run by bash; with `notice` USR1 comes during the
    training."""
    (folder / "job.sbatch").write_text(text("run.directory=run", *overrides))
    for name, body in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(body)
        (folder / name).chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    job = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n1", "PATH": f"{folder}:{os.environ['PATH']}"}
    process = subprocess.Popen(
        ["bash", "job.sbatch"],
        cwd=folder,
        env=clean | job | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 30
        while notice and not (folder / "training").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if notice:
            process.send_signal(signal.SIGUSR1)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, output, (folder / "calls").read_text().splitlines()


def test_a_run_that_ends_is_not_queued_again(tmp_path):
    code, output, calls = run_batch(tmp_path, QUICK="0")
    assert code == 0 and "ends with code 0" in output
    assert len(calls) == 3 and "node_health recipe.yaml" in calls[0] and "doctor --parity recipe.yaml" in calls[1]
    assert calls[2].endswith("--output=run.slurm/7-rank-%t.log --open-mode=append dapo-megatron train recipe.yaml")


def test_the_notice_reaches_the_launcher_and_the_job_is_queued_again(tmp_path):
    code, output, calls = run_batch(tmp_path, notice=True)
    assert code == 138 and "the time limit is near" in output
    assert calls[3:] == ["scontrol requeue 7"]


def test_a_run_that_gives_way_to_another_job_is_queued_again(tmp_path):
    """It leaves a checkpoint as when it is stopped by hand, and says that it does not want to be started again."""
    preempted = {"QUICK": "143", "FINALLY": "yes", "PREEMPTED": "2026-11-22T09:24:07"}
    code, output, calls = run_batch(tmp_path, **preempted)
    assert code == 143 and "preempted\n" in output and calls[3:] == ["scontrol requeue 7"]
    (tmp_path / "calls").unlink()
    code, output, calls = run_batch(tmp_path, **preempted | {"PREEMPTED": "None"})
    assert code == 143 and "not queued again: why" in output and "scontrol requeue 7" not in calls
    (tmp_path / "calls").unlink()
    code, output, calls = run_batch(tmp_path, **preempted | {"QUICK": "0"})  # it was done in time
    assert code == 0 and "scontrol requeue 7" not in calls


def test_after_a_restart_it_resumes_and_restarts_have_an_end(tmp_path):
    overrides = ("slurm.most_restarts=3",)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    code, output, calls = run_batch(tmp_path, overrides=overrides, notice=True, SLURM_RESTART_COUNT="3")
    assert code == 138 and "not queued again after 3 restarts" in output
    assert len(calls) == 3 and calls[2].endswith("train recipe.yaml --resume")


def test_a_restart_goes_on_only_with_what_the_job_has_begun(tmp_path):
    """Or `--overwrite` would go on with the run that it was to replace."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    for restarts, variables, ending in (
        (0, {"EARLY": "1"}, ""),
        (1, {"QUICK": "1"}, ""),
        (2, {"QUICK": "1"}, " --resume"),
    ):
        _, _, calls = run_batch(tmp_path, SLURM_RESTART_COUNT=str(restarts), **variables)
        train = [call for call in calls if " train " in call][-1]
        assert train.endswith(f"train recipe.yaml{ending}"), (restarts, train)


def test_a_stack_that_fails_trains_nothing_and_shows_its_verdict(tmp_path):
    code, output, calls = run_batch(tmp_path, PARITY="1")
    assert code == 1 and len(calls) == 2 and "parity" in calls[1]
    assert "parity: FAILED, so the run does not start\nverdict\n" in output and "ends with code 1" in output
    assert (tmp_path / "run.slurm" / "7-parity.json").read_text() == "verdict\n"
    _, output, calls = run_batch(tmp_path, QUICK="0", SLURM_RESTART_COUNT="1")
    assert len([call for call in calls if "parity" in call]) == 2, "a failure was taken for a pass"


def test_a_passed_stack_is_not_tried_again_on_the_same_nodes_of_the_job(tmp_path):
    restarted = {"QUICK": "0", "SLURM_RESTART_COUNT": "1"}
    for tried, variables in (
        (1, {"QUICK": "0"}),
        (1, restarted),
        (2, restarted | {"SLURM_JOB_NODELIST": "n[1-2]"}),
        (3, restarted | {"SLURM_JOB_ID": "8"}),
    ):
        code, output, calls = run_batch(tmp_path, **variables)
        assert code == 0 and len([call for call in calls if "parity" in call]) == tried
        assert ("these nodes have passed" in output) == (variables is restarted)


def test_a_failure_is_repeated_as_long_as_the_run_gets_further(tmp_path):
    assert fails(tmp_path, 2)[0] == "scontrol requeue 7"
    (tmp_path / "run" / "checkpoints" / "step-000002").mkdir(parents=True)
    assert fails(tmp_path, 2, code="137", restarts=2)[0] == "scontrol requeue 7"  # killed for its memory, twice again
    told = fails(tmp_path, 1, restarts=4)
    assert "scontrol requeue 7" not in told
    assert "failed with code 1, 3 in a row without a new checkpoint" in told[-3] and "not queued again" in told[-2]


def test_a_failure_that_would_come_again_is_not_repeated(tmp_path):
    told = fails(tmp_path, 1, code="2", FINALLY="1")
    assert "scontrol requeue 7" not in told and "not queued again: why" in told[-2]
    assert fails(tmp_path, 1, code="1")[0] == "scontrol requeue 7"  # what an earlier start said is forgotten


def test_a_node_that_is_lost_again_and_again_does_not_start_the_run_for_ever(tmp_path):
    (tmp_path / "calls").touch()
    code, output, calls = run_batch(tmp_path, overrides=("slurm.most_restarts=3",), SLURM_RESTART_COUNT="4")
    assert (code, calls) == (1, []) and "not started again after 3 restarts" in output


@pytest.mark.parametrize("settings", [("slurm.failures=0",), ("slurm.requeue=false",)])
def test_restarts_after_failures_can_be_left_out(tmp_path, settings):
    code, _, calls = run_batch(tmp_path, overrides=settings, QUICK="1")
    assert code == 1 and len(calls) == 3


def test_nodes_that_are_not_fit_train_nothing(tmp_path):
    code, output, calls = run_batch(tmp_path, HEALTH="1")
    assert code == 1 and len(calls) == 1 and "ends with code 1" in output


def test_each_task_of_an_array_has_its_own_recipe(tmp_path):
    arguments = [["a.yaml"], ["b.yaml", "run.seed=2"]]
    recipe = load_recipe(TINY, ["run.directory=run"])
    whole = batch_file(recipe, command="test", arguments=arguments, directories=["run", "other"])
    assert "    1) arguments=(b.yaml run.seed=2) run_in=other ;;" in whole.splitlines()
    assert "#SBATCH --array=0-1" in whole and "run.slurm/%A_%a.out" in whole
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    job = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_NODELIST": "n1"}
    environment = {**os.environ, **job, "QUICK": "0", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", whole], cwd=tmp_path, env=environment, check=True, timeout=60, capture_output=True)
    last = (tmp_path / "calls").read_text().splitlines()[-1]
    assert last.endswith("--output=run.slurm/8_1-rank-%t.log --open-mode=append dapo-megatron train b.yaml run.seed=2")
