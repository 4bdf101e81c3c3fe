"""The batch file of a recipe: text for sbatch, in which every number comes from the recipe. No torch.

    health check of all nodes → `doctor --parity` on the first one → train
                                       → where the notice of the time limit came: checkpoint, requeue, `--resume`
                                       → where it failed: requeue, `--resume`, unless that would be in vain

Slurm sends USR1 to the script alone; the script hands it to the launcher, which hands it to the ranks.
"""

import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from dapo_megatron.config import Recipe
from dapo_megatron.errors import FINAL
from dapo_megatron.launch import PORTS
from dapo_megatron.slurm.placement import Placement, place_ranks

ENDING_S = 300  # after the first rank has left the others get this long to write their last files
PARITY_LIMITS = 6  # limits of a part that the whole parity check gets: its five parts, and the start of its container

OWN_RUN = (
    "# what lies in the directory is gone on with only if this job has begun it",
    'if [ "$restarts" -eq 0 ]; then',
    '    touch "$log-started"',
    'elif [ "$run_in/config.yaml" -nt "$log-started" ]; then',
    "    mode=--resume",
    "fi",
)

RUN = """\
say() {
    echo "$(date +%FT%T) $*"
}

# a shell takes signals between commands only: what it starts runs beside it and is waited for
code=0
step=
stopping=0
run() {
    "$@" &
    step=$!
    if [ "$stopping" -eq 1 ]; then kill -USR1 "$step" || true; fi
    while kill -0 "$step" 2>/dev/null; do wait "$step" || true; done
    code=0
    wait "$step" || code=$?
    step=
}

# shellcheck disable=SC2317,SC2329  # the trap calls it
notice() {
    say "the time limit is near: the run stops after its present step"
    stopping=1
    if [ -n "$step" ]; then kill -USR1 "$step" || true; fi
}
trap notice USR1
"""

PARITY = """\
# a job keeps its recipe: its verdict holds after a requeue, until the nodes are others
parity() {{
    if [ "$(cat "$log-parity.nodes" 2>/dev/null)" = "$SLURM_JOB_NODELIST" ]; then
        say "parity: these nodes have passed in this job, verdict in $log-parity.json"
        return
    fi
    say "parity on the first node, verdict in $log-parity.json"
    local one=(
{options}
    )
    run "${{launch[@]}}" "${{one[@]}}" dapo-megatron doctor --parity "${{arguments[@]}}" --json --time-limit {limit}
    if [ "$code" -eq 0 ]; then
        echo "$SLURM_JOB_NODELIST" >"$log-parity.nodes"
    elif [ "$stopping" -eq 0 ]; then
        say "parity: FAILED, so the run does not start"
        cat "$log-parity.json" "$log-parity.log" || true
    fi
}}
"""

REQUEUE = """\
newest() {{
    find "$run_in/checkpoints" -maxdepth 1 -name 'step-*' 2>/dev/null | sort -V | tail -n 1 || true
}}

# slurm's grace time before it takes the nodes away; whoever stops a run by hand leaves no such time behind
preempted() {{
    local job="${{SLURM_ARRAY_JOB_ID:+${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID}}"
    [[ "$(scontrol show job "${{job:-$SLURM_JOB_ID}}" -o || true)" == *" PreemptTime="[0-9]* ]]
}}

again=0
if [ "$finished" -eq 0 ] && [ "$stopping" -eq 1 ]; then
    again=1
elif [ "$finished" -eq 0 ] && preempted; then
    say "preempted"
    again=1
elif [ "$failed" -eq 1 ] && [ -e "$log-final" ]; then
    say "not queued again: $(head -n 1 "$log-final")"
elif [ "$failed" -eq 1 ]; then
    # a run that fails, goes on and fails again is repeated as long as it gets further
    failures=0
    known=
    if [ -r "$log-failures" ]; then read -r failures known <"$log-failures" || true; fi
    if [ "$known" != "$(newest)" ]; then failures=0; fi
    failures=$((failures + 1))
    echo "$failures $(newest)" >"$log-failures"
    say "failed with code $code, $failures in a row without a new checkpoint"
    if [ "$failures" -le {failures} ]; then again=1; else say "not queued again after so many"; fi
fi
if [ "$again" -eq 1 ]; then
    if [ "$restarts" -lt {most} ]; then
        say "queued again, to go on from the newest checkpoint"
        scontrol requeue "$SLURM_JOB_ID"
    else
        say "not queued again after $restarts restarts"
    fi
fi
"""

# reasons stand in the file: whoever looks for a slow or broken link reads it there
GPU_ENVIRONMENT = """\
# kernels start in the order of their launch: megatron's overlap of tensor-parallel communication relies on it
export CUDA_DEVICE_MAX_CONNECTIONS=1
# vLLM turns it off in its workers, and all ranks of a communicator must agree
export NCCL_CUMEM_ENABLE=0
# NVLink SHARP keeps GPU memory for every communicator, and learner and engines have many
export NCCL_NVLS_ENABLE=0
# 4.096 us x 2^22 = 17 s a try: a link that fails over to another port does not end the run
export NCCL_IB_TIMEOUT=22
# warnings name the link that failed; INFO would fill the log of every rank
export NCCL_DEBUG=WARN
# RDMA pins memory
ulimit -l "$(ulimit -Hl)"
"""


def slurm_folder(recipe: Recipe) -> Path:
    """Beside the run directory, which `--overwrite` may replace while logs are written here."""
    return Path(f"{recipe.run.directory.rstrip('/')}.slurm")


def batch_file(
    recipe: Recipe,
    *,
    command: str,
    arguments: Sequence[Sequence[str]],
    directories: Sequence[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> str:
    """The text of a batch file.

    Args:
        command: what wrote it, for the file's first lines.
        arguments: RECIPE and overrides of each run; of several an array job is made, a task a run, each on the nodes
            of `recipe`.
        directories: the run directory of each; None = of one run, `recipe`'s.
        resume, overwrite: as of `train`, at the first start; --resume once the job has begun its run.

    Raises:
        RequestError: as `place_ranks`.
    """
    placement = place_ranks(recipe)
    folder = slurm_folder(recipe).as_posix()
    first = "--resume" if resume else "--overwrite" if overwrite else ""
    blocks = [
        _options(recipe, placement, folder, command, len(arguments)),
        _preparation(recipe, folder, arguments, directories or [recipe.run.directory], first),
        _environment(recipe, placement),
        RUN,
        _launcher(recipe, placement),
        _parity(recipe, placement) if recipe.slurm.parity_check else "",
        _work(recipe),
        REQUEUE.format(most=recipe.slurm.most_restarts, failures=recipe.slurm.failures) if recipe.slurm.requeue else "",
        'say "ends with code $code"\nexit "$code"\n',
    ]
    return "\n".join(filter(None, blocks))


def _options(recipe: Recipe, placement: Placement, folder: str, command: str, runs: int) -> str:
    slurm = recipe.slurm
    tasks = placement.tasks_per_node if slurm.launcher == "srun" else 1
    found: list[tuple[str, object]] = [
        ("job-name", re.sub(r"[^\w.-]+", "-", recipe.run.name)),
        ("output", f"{folder}/{'%A_%a' if runs > 1 else '%j'}.out"),
        ("open-mode", "append"),
        ("array", f"0-{runs - 1}" if runs > 1 else None),
        ("nodes", placement.nodes),
        ("ntasks-per-node", tasks),
        ("gpus-per-node", placement.gpus_per_node or None),
        ("cpus-per-task", _cpus(recipe, placement)),
        ("mem", slurm.memory),
        *((name, getattr(slurm, name)) for name in ("partition", "account", "qos", "reservation", "constraint")),
        ("time", slurm.time_limit),
        ("signal", f"B:USR1@{slurm.stop_before_s}"),
    ]
    lines = [f"--{name}={value}" for name, value in found if value is not None]
    lines += ["--exclusive"] if slurm.exclusive else []
    lines += ["--requeue" if slurm.requeue else "--no-requeue", *slurm.options]
    head = ["#!/bin/bash", f"# Written by `{command}`: change the recipe, not this file."]
    return "\n".join([*head, *(f"#SBATCH {line}" for line in lines)]) + "\n"


def _preparation(
    recipe: Recipe, folder: str, arguments: Sequence[Sequence[str]], directories: Sequence[str], first: str
) -> str:
    several = len(arguments) > 1
    job = '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' if several else '"$SLURM_JOB_ID"'
    lines = ["set -euo pipefail", f"mkdir -p {shlex.quote(folder)}", f"log={shlex.quote(folder)}/{job}"]
    if several:
        runs = enumerate(zip(arguments, directories, strict=True))
        cases = [f"    {i}) arguments=({shlex.join(words)}) run_in={shlex.quote(run)} ;;" for i, (words, run) in runs]
        lines += ['case "$SLURM_ARRAY_TASK_ID" in', *cases, "esac"]
    else:
        lines.append(f"arguments=({shlex.join(arguments[0])}) run_in={shlex.quote(directories[0])}")
    lines += [
        "# slurm counts restarts, after a lost node too",
        'restarts="${SLURM_RESTART_COUNT:-0}"',
        f"mode={first}",
        *OWN_RUN,
    ]
    if recipe.slurm.requeue:
        most = recipe.slurm.most_restarts
        lines += [
            f'if [ "$restarts" -gt {most} ]; then echo "not started again after {most} restarts"; exit 1; fi',
            "# by this file the run tells that a restart would be in vain",
            f'export {FINAL}="$log-final"',
            f'rm -f "${FINAL}"',
        ]
    return "\n".join(lines) + "\n"


def _environment(recipe: Recipe, placement: Placement) -> str:
    slurm = recipe.slurm
    lines = [*slurm.setup, f"export OMP_NUM_THREADS={recipe.learner.threads}"]
    text = "\n".join(lines) + "\n" + (GPU_ENVIRONMENT if placement.gpus_per_node else "")
    return text + "".join(f"export {assignment}\n" for assignment in slurm.environment)


def _launcher(recipe: Recipe, placement: Placement) -> str:
    """The array `launch`: what stands before a command that every rank is to run."""
    slurm = recipe.slurm
    step = [
        ("--mpi=none", "ranks meet over TCP"),
        ("--distribution=block", "consecutive ranks share a node, as tensor-parallel groups want"),
        ("--kill-on-bad-exit=0", "a run that stops leaves rank by rank; the last ones finish their files"),
        (f"--wait={ENDING_S}", "but not for ever"),
        ("--cpu-bind=none", "engines and graders are children of ranks and use all cores of the node"),
    ]
    if (cpus := _cpus(recipe, placement)) is not None:
        step.append((f"--cpus-per-task={cpus}", "which srun does not take over from sbatch"))
    if slurm.container_image is not None:
        mounts = ",".join(["$PWD:$PWD", *slurm.container_mounts])
        step += [
            (f"--container-image={slurm.container_image}", ""),
            (f'--container-mounts="{mounts}"', "paths mean the same inside and outside"),
            ('--container-workdir="$PWD"', ""),
        ]
    lines = [
        "launch=(",
        "    srun",
        *(f"    {option}{f'  # {reason}' if reason else ''}" for option, reason in step),
        ")",
    ]
    if slurm.launcher == "torchrun":
        lines += [
            'head="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"',
            f'port="$(({PORTS[0]} + SLURM_JOB_ID % {PORTS[1] - PORTS[0]}))"',
            "torchrun=(",
            "    # torchrun itself knows no USR1 and would end; ranks do",
            '    bash -c \'trap "" USR1; exec "$@"\' bash',
            "    torchrun",
            f"    --nnodes={placement.nodes}",
            f"    --nproc-per-node={placement.tasks_per_node}",
            "    --rdzv-backend=c10d",
            '    --rdzv-endpoint="$head:$port"',
            '    --rdzv-id="$SLURM_JOB_ID"',
            '    --log-dir="$log-ranks"',
            "    --redirects=3  # both outputs of a rank into files; those of a node's first rank also here",
            "    --tee=0:3",
            "    --no-python",
            ")",
        ]
    return "\n".join(lines) + "\n"


def _parity(recipe: Recipe, placement: Placement) -> str:
    """The shell function `parity`: one task, which sees all GPUs of its node as every rank does."""
    limit = recipe.slurm.parity_limit_s
    minutes, seconds = divmod(PARITY_LIMITS * limit, 60)
    options = ["--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--relative=0", f"--time={minutes}:{seconds:02d}"]
    if recipe.slurm.launcher == "srun" and (cpus := _cpus(recipe, placement)) is not None:
        options.append(f"--cpus-per-task={cpus * placement.tasks_per_node}")
    options += ['--output="$log-parity.json"', '--error="$log-parity.log"', "--open-mode=truncate"]
    return PARITY.format(options="\n".join(f"        {option}" for option in options), limit=limit)


def _work(recipe: Recipe) -> str:
    return "\n".join(_steps(recipe)) + "\n"


def _steps(recipe: Recipe) -> Iterator[str]:
    torchrun = recipe.slurm.launcher == "torchrun"
    inner = '"${launch[@]}" "${torchrun[@]}"' if torchrun else '"${launch[@]}"'
    output = "node-%n" if torchrun else "rank-%t"
    files = f'--output="$log-{output}.log" --open-mode=append'
    train = '"${launch[@]}" ' + files + (' "${torchrun[@]}"' if torchrun else "")
    if recipe.slurm.requeue:
        yield "finished=0"
        yield "failed=0"
    checks = []
    if recipe.slurm.health_check:
        yield 'say "health check of $SLURM_JOB_NODELIST"'
        checks.append(f'run {inner} python -m dapo_megatron.slurm.node_health "${{arguments[@]}}"')
    if recipe.slurm.parity_check:
        checks.append("parity")
    for depth, check in enumerate(checks):
        yield f"{'    ' * depth}{check}"
        yield f"{'    ' * depth}" + 'if [ "$code" -eq 0 ] && [ "$stopping" -eq 0 ]; then'
    indent = "    " * len(checks)
    yield f'{indent}say "train ${{arguments[*]}} $mode, output in $log-*"'
    yield f'{indent}run {train} dapo-megatron train "${{arguments[@]}}" ${{mode:+"$mode"}}'
    if recipe.slurm.requeue:
        yield f'{indent}if [ "$code" -eq 0 ]; then finished=1; else failed=1; fi'
    for depth in reversed(range(len(checks))):
        yield f"{'    ' * depth}fi"


def _cpus(recipe: Recipe, placement: Placement) -> int | None:
    """CPU cores of a task: with torchrun a task holds all ranks of its node."""
    cpus = recipe.slurm.cpus_per_task
    if cpus is None or recipe.slurm.launcher == "srun":
        return cpus
    return cpus * placement.tasks_per_node
