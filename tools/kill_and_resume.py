"""Exact resume, tried hard: a run on TP 2 x PP 2 is killed again and again at random moments of every phase, resumed
each time, and compared with a run that nobody disturbed.

    python tools/kill_and_resume.py [--kills 20] [--steps 24] [--seed 0] [--work DIR]

All ranks get SIGKILL at once. Metrics (times apart), samples, the model and every file of the last checkpoint must be
equal to the bit; if not, or if a phase was never hit, the exit code is 1. Ranks are forked from one process that has
imported everything, so that a start costs little; otherwise they run what `dapo-megatron train --resume` runs.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

RECIPE = ROOT / "recipes" / "tiny-arithmetic-cpu.yaml"
RANKS = 4
SETTINGS = (
    "data.generate={train_prompts: 64, validation_prompts: 8, supervised_examples: 64}",
    "supervised.stages=[{data: worked, steps: 3, batch_sequences: 8, learning_rate: 1.0e-3}]",
    "rollout={prompts_per_step: 4, samples_per_prompt: 4, max_response_length: 12, time_limit_s: 300}",
    "algorithm.mini_batch_prompts=2",
    # more groups than a step trains on: some are kept for the next one
    "algorithm.dynamic_sampling={metric: reward_std, max_waves: 2, over_sampling: 2, adaptive: false}",
    "algorithm.importance_bound=2.0",
    "algorithm.adaptive_entropy={target: 2.0, delta: 0.003}",
    # a random model answers nothing right: with length in the reward there is something to learn
    "reward.overlong={max_length: 12, cache_length: 11}",
    "evaluation={every: 4, samples: 1}",
    "optimizer.learning_rate=2.0e-5",  # slow enough that responses stay of many lengths
    "optimizer.min_learning_rate=2.0e-6",
    "monitoring.tensorboard=false",
    "learner.time_limit_s=300",
    "checkpoint.every=1",
)
PHASES = ("start", "rollout", "learn", "reshard", "save", "validation")
WANTED = ("rollout", "learn", "reshard", "save")  # a run of this tool must have hit these
LONGEST_WAIT_S = {"start": 4.0, "rollout": 0.5, "learn": 0.4, "reshard": 0.01, "save": 0.3, "validation": 0.2}
ATTEMPT_LIMIT_S = 600.0


class Markers:
    """Which phases each rank is in, told through one small file a rank: those that are on, how often each began."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def clear(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()

    def read(self) -> list[dict]:
        """{"on": phases, "begun": phase → times} of each rank that has begun one."""
        found = []
        for path in sorted(self.folder.glob("rank-*.json")):
            try:
                found.append(json.loads(path.read_text()))
            except (OSError, ValueError):
                continue  # written at this moment
        return found

    def install(self, rank: int) -> None:
        """In a rank: have its phases told."""
        from dapo_megatron import train
        from dapo_megatron.learner import checkpoint_saver

        on: list[str] = []
        begun: Counter = Counter()
        path = self.folder / f"rank-{rank}.json"
        turn = threading.Lock()  # a checkpoint is written in a thread of its own

        def tell(begins: str = "", ends: str = "") -> None:
            with turn:
                if begins:
                    on.append(begins)
                    begun[begins] += 1
                if ends:
                    on.remove(ends)
                temporary = path.with_suffix(".tmp")
                temporary.write_text(json.dumps({"on": on, "begun": begun}))
                temporary.replace(path)

        @contextmanager
        def told(name: str):
            tell(begins=name)
            try:
                yield
            finally:
                tell(ends=name)

        phase, write = train.Clock.phase, checkpoint_saver.write_checkpoint

        @contextmanager
        def told_phase(clock, name: str):
            with told(name), phase(clock, name):
                yield

        def told_write(*arguments):
            with told("save"):
                write(*arguments)

        train.Clock.phase, checkpoint_saver.write_checkpoint = told_phase, told_write


class Ranks:
    """The ranks of one attempt, forked into one process group that the first of them leads."""

    def __init__(self, recipe, markers: Markers, log: Path) -> None:
        from dapo_megatron.launch import free_port

        port, self.pids, self.codes = free_port(), [], {}
        for rank in range(RANKS):
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, self.pids[0] if self.pids else 0)
                _become_rank(recipe, rank, port, markers, log)
            self.pids.append(pid)
            os.setpgid(pid, self.pids[0])

    def poll(self) -> bool:
        """Whether all have ended; `codes` has the exit codes so far."""
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == RANKS

    def kill(self) -> None:
        """SIGKILL to all at once, what they started included."""
        with suppress(ProcessLookupError):  # all have ended by themselves
            os.killpg(self.pids[0], signal.SIGKILL)
        while not self.poll():
            time.sleep(0.01)


def _become_rank(recipe, rank: int, port: int, markers: Markers, log: Path) -> None:
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(
            RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
        )
        from dapo_megatron.errors import exit_with_message
        from dapo_megatron.launch import World, die_with_parent
        from dapo_megatron.worker import Mode, run_rank

        die_with_parent()
        markers.install(rank)
        with exit_with_message():
            code = run_rank(recipe, World(rank, RANKS, rank), Mode(resume=True))
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def run_to_end(recipe, markers: Markers, log: Path) -> None:
    """An attempt that nobody kills; raises SystemExit with the ranks' output if it fails."""
    ranks = Ranks(recipe, markers, log)
    deadline = time.monotonic() + ATTEMPT_LIMIT_S
    while not ranks.poll():
        if time.monotonic() > deadline or any(ranks.codes.values()):
            ranks.kill()
        time.sleep(0.05)
    if any(ranks.codes.values()):
        raise SystemExit(f"a rank failed; its output, {log}:\n{log.read_text()[-4000:]}")


def run_and_kill(recipe, markers: Markers, log: Path, phase: str, turn: int, delay_s: float) -> set[str] | None:
    """An attempt that is killed `delay_s` after any rank began `phase` for the `turn`-th time.

    Returns the phases that ranks were in ("start" before the first), None if the run came to its end instead.
    """
    markers.clear()
    ranks = Ranks(recipe, markers, log)
    deadline = time.monotonic() + ATTEMPT_LIMIT_S
    while phase != "start" and not any(told["begun"].get(phase, 0) >= turn for told in markers.read()):
        if ranks.poll() or any(ranks.codes.values()) or time.monotonic() > deadline:
            break
        time.sleep(0.0005)
    time.sleep(delay_s)
    if ranks.poll() and not any(ranks.codes.values()):
        return None
    failed = [code for code in ranks.codes.values() if code]
    ranks.kill()
    if failed or time.monotonic() > deadline:
        raise SystemExit(f"a rank failed before it was killed; its output, {log}:\n{log.read_text()[-4000:]}")
    told = markers.read()
    return {name for rank in told for name in rank["on"]} or ({"between"} if told else {"start"})


def choose(draw: random.Random, hit: Counter) -> tuple[str, int, float]:
    """(phase, turn, delay) of the next kill: at random, but first what was hit least."""
    least = min(hit[phase] for phase in WANTED)
    phase = draw.choice([p for p in WANTED if hit[p] == least] if draw.random() < 0.7 else PHASES)
    return phase, draw.choice((1, 1, 2)), draw.uniform(0.0, LONGEST_WAIT_S[phase])


def differences(whole: Path, killed: Path) -> list[str]:
    """What of two finished runs is not equal, a line each."""
    found = []
    for name in ("metrics.jsonl", "supervised.jsonl", "samples.jsonl"):
        lines = [[json.loads(line) for line in (run / name).read_text().splitlines()] for run in (whole, killed)]
        lines = [[{k: v for k, v in x.items() if not k.startswith("time/")} for x in side] for side in lines]
        if len(lines[0]) != len(lines[1]):
            found.append(f"{name}: {len(lines[0])} lines undisturbed, {len(lines[1])} after the kills")
        for one, other in zip(*lines, strict=False):
            keys = [key for key in {**one, **other} if one.get(key) != other.get(key)]
            found += [f"{name} step {one.get('step')}: {k} {one.get(k)} and {other.get(k)}" for k in keys]
    if (whole / "hf" / "model.safetensors").read_bytes() != (killed / "hf" / "model.safetensors").read_bytes():
        found.append("hf/model.safetensors differs")
    newest = [sorted(run.glob("checkpoints/step-*"))[-1] for run in (whole, killed)]
    sums = [json.loads((folder / "manifest.json").read_text())["files"] for folder in newest]
    # Python's and numpy's own generators begin anew with every process, and nothing draws from them; the bytes of the
    # pickled index depend on which of its equal strings are one object
    names = [n for n in {**sums[0], **sums[1]} if not n.startswith("random/") and n != "shards/.metadata"]
    found += [f"{newest[0].name}/{n} differs" for n in names if sums[0].get(n) != sums[1].get(n)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, help="default: so many that every kill finds a run to kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="where the runs are kept; default: a temporary folder")
    arguments = parser.parse_args()
    if arguments.kills < 1:
        parser.error(f"--kills {arguments.kills}: at least 1")
    work = arguments.work or Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    try:
        return kill_and_compare(work, arguments.kills, arguments.steps or 4 + arguments.kills, arguments.seed)
    finally:
        if arguments.work is None:
            shutil.rmtree(work, ignore_errors=True)


def kill_and_compare(work: Path, kills: int, steps: int, seed: int) -> int:
    """Both runs and their comparison, printed; the exit code."""
    from dapo_megatron.learner import megatron_cpu

    megatron_cpu.install()
    import transformers.models.qwen2.modeling_qwen2  # noqa: F401

    import dapo_megatron.rollout.hf_engine
    import dapo_megatron.worker  # noqa: F401
    from dapo_megatron.config import load_recipe

    recipes = {
        name: load_recipe(RECIPE, [*SETTINGS, f"run.steps={steps}", f"run.directory={work / name}"])
        for name in ("whole", "killed")
    }
    for name in (*recipes, "markers"):
        shutil.rmtree(work / name, ignore_errors=True)
    for name in ("whole.log", "ranks.log"):
        (work / name).unlink(missing_ok=True)
    markers, log = Markers(work / "markers"), work / "ranks.log"
    started = time.monotonic()
    run_to_end(recipes["whole"], markers, work / "whole.log")
    print(f"undisturbed: {steps} steps in {time.monotonic() - started:.0f} s", flush=True)
    draw, hit, done = random.Random(seed), Counter(), 0
    while done < kills:
        phase, turn, delay_s = choose(draw, hit)
        phases = run_and_kill(recipes["killed"], markers, log, phase, turn, delay_s)
        if phases is None:
            print(f"the run ended after {done} kills; give more --steps", flush=True)
            break
        done += 1
        hit.update(phases)
        lines = work / "killed" / "metrics.jsonl"
        step = lines.read_bytes().count(b"\n") - 1 if lines.exists() else -1
        print(f"kill {done:>2} in {', '.join(sorted(phases))} (aimed at {phase}), step {step}", flush=True)
    run_to_end(recipes["killed"], markers, log)
    told = log.read_text()
    print(
        f"{done} kills, {told.count('resumed from')} times resumed from a checkpoint, "
        f"{time.monotonic() - started:.0f} s"
    )
    print("phases hit: " + ", ".join(f"{phase} {hit[phase]}" for phase in (*PHASES, "between")))
    found = differences(work / "whole", work / "killed")
    print(
        "\n".join(found)
        or f"all metrics but time/* of {steps} steps, samples, model and checkpoint are equal to the bit"
    )
    missed = [phase for phase in WANTED if not hit[phase]] if kills >= len(WANTED) else []
    if missed:
        print(f"never hit: {', '.join(missed)}; give another --seed or more --kills")
    return 1 if found or missed or done < kills else 0


if __name__ == "__main__":
    sys.exit(main())
