"""`dapo-megatron doctor --parity [RECIPE]`: parts of the stack that go wrong in silence, each run beside its reference.

Every part is a process of its own with a limit of time: one that hangs or dies has failed, and the others still run.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dapo_megatron.config import Recipe
from dapo_megatron.doctor.parity_model import Trial, trial_of, write_trial
from dapo_megatron.doctor.verdict import FAILED, SKIPPED, Verdict, verdict_of
from dapo_megatron.errors import RequestError
from dapo_megatron.launch import die_with_parent

PARTS = {
    "kernels": "Triton kernels beside torch in fp64",
    "parameters": "TransformerEngine's parameters beside the table that plans count with",
    "layers": "TransformerEngine's layers beside the local ones",
    "engine": "vLLM's log-probs beside the learner's",
    "reshard": "weights from Megatron shards into an engine's, by checksum",
}
SCHEMA = 1
TAIL = 600  # characters of a failed part's error output
WORLD = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_", "TORCHELASTIC_", "GROUP_RANK")


def check_parity(recipe: Recipe | None, name: str | None, *, json_wanted: bool, time_limit_s: float) -> int:
    """Run all parts, print a verdict on each; returns 0 where none failed, else 1.

    Raises:
        RequestError: the recipe's model folder; a time limit that is not positive.
    """
    if not time_limit_s > 0:
        raise RequestError(f"--time-limit {time_limit_s:g} must be positive; use 300")
    trial = trial_of(recipe)
    verdicts = []
    with TemporaryDirectory(prefix="dapo-doctor-") as folder:
        write_trial(trial, Path(folder))
        for part in PARTS:
            verdicts.append(run_part(part, Path(folder), trial, time_limit_s))
            if not json_wanted:
                print(_line(verdicts[-1]), flush=True)
    passed = not any(verdict.outcome == FAILED for verdict in verdicts)
    if json_wanted:
        told = {"schema": SCHEMA, "passed": passed, "recipe": name, "parts": [_plain(v) for v in verdicts]}
        print(json.dumps(told))
    else:
        print(f"parity: {'nothing failed' if passed else 'FAILED'}")
    return 0 if passed else 1


def run_part(part: str, folder: Path, trial: Trial, time_limit_s: float) -> Verdict:
    """One part in a process of its own; whatever it started ends with it. One that the recipe has no use for is
    skipped."""
    if part in trial.idle:
        return Verdict(part, SKIPPED, trial.idle[part])
    started = time.monotonic()
    log = folder / f"{part}.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            part_command(part, folder),
            env=_environment(part, trial),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        try:
            code = process.wait(time_limit_s)
            why = f"its process ended with code {code}; {_tail(log)}"
        except subprocess.TimeoutExpired:
            why = f"not done within {time_limit_s:g} s (--time-limit); {_tail(log)}"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    result = folder / f"{part}.json"
    told = json.loads(result.read_text(encoding="utf-8")) if result.exists() else None
    return verdict_of(part, told, why, seconds=time.monotonic() - started, needed=trial.needed.get(part))


def part_command(part: str, folder: Path) -> list[str]:
    """What runs a part."""
    return [sys.executable, "-m", "dapo_megatron.doctor.parity_part", part, str(folder)]


def _environment(part: str, trial: Trial) -> dict[str, str]:
    """No world of somebody else's; without a GPU Triton's kernels run in its interpreter."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(WORLD)}
    environment |= {"OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    if trial.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    if part == "kernels" and not _has_gpu(trial):
        environment["TRITON_INTERPRET"] = "1"  # before triton is imported
    return environment


def _has_gpu(trial: Trial) -> bool:
    return trial.device != "cpu" and os.environ.get("CUDA_VISIBLE_DEVICES") != "" and Path("/dev/nvidiactl").exists()


def _tail(log: Path) -> str:
    text = log.read_text(errors="replace").strip()
    return f"the end of its output: …{text[-TAIL:]}" if text else "it printed nothing"


def _plain(verdict: Verdict) -> dict[str, Any]:
    """JSON has no NaN and no infinity."""
    told = asdict(verdict)
    if verdict.number is not None and not math.isfinite(verdict.number):
        told["number"] = None
    return told


def _line(verdict: Verdict) -> str:
    number = "" if verdict.number is None else f" {verdict.number:.3g}, at most {verdict.bound:.3g}:"
    outcome = verdict.outcome if verdict.outcome == SKIPPED else f"{verdict.outcome}{number}"
    return f"{verdict.part:<12}{outcome} {verdict.text}  [{verdict.seconds:.0f} s]"
