"""The ladder from naive GRPO to DAPO over several seeds: a table (Markdown, CSV) and curves (PNG).

Each seed makes one warm start, which all rungs continue. Finished cells are kept; a cell that was killed goes on from
its last checkpoint, so the command can be stopped and started again.

    python tools/ladder.py [--out runs/ladder] [--seeds 1 2 3] [--jobs 2] [--cell-limit-s 3600]
                           [--set key.sub=value ...]
"""

import argparse
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dapo_megatron.config import dump_recipe, load_recipe  # noqa: E402
from dapo_megatron.errors import RequestError, RunError, exit_with_message  # noqa: E402
from dapo_megatron.files import replace_folder, write_text_atomically  # noqa: E402
from dapo_megatron.launch import die_with_parent  # noqa: E402
from tools.ladder_table import Cell, Rung, check_finished, draw_curves, read_cell, rows_csv, table_markdown  # noqa: E402

RECIPES = ROOT / "recipes" / "ladder"
RUNGS = (
    Rung("1-naive-grpo", "naive GRPO"),
    Rung("2-overlong-filtering", "+ overlong filtering"),
    Rung("3-clip-higher", "+ Clip-Higher"),
    Rung("4-soft-overlong", "+ soft overlong punishment"),
    Rung("5-token-level", "+ token-level loss"),
    Rung("6-dapo", "+ dynamic sampling = DAPO"),
)
SHARED = ("checkpoint.hugging_face=false", "monitoring.tensorboard=false")
START_OF_RUNGS = "checkpoints/step-000000/manifest.json"
Train = Callable[[list[str], Path], int]  # (arguments of `train`, file for the output) → exit code


def run_train(arguments: list[str], log: Path, *, limit_s: float) -> int:
    """`dapo-megatron train` in a process of one thread; 124 where it ran past the limit. It dies with this process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    with open(log, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "dapo_megatron.cli", "train", *arguments],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            preexec_fn=die_with_parent,
        )
        try:
            return process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            return 124
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def warm_start(out: Path, seed: int, recipe: Path, overrides: Sequence[str], train: Train) -> Path:
    """The run that all rungs of a seed continue, by a recipe of any of them; made once.

    Raises:
        RequestError: another command is at work on it.
        RunError: the run failed.
    """
    directory = out / f"seed{seed}" / "warm"
    with _claimed(directory):
        if not (directory / START_OF_RUNGS).is_file():
            arguments = [
                *(str(recipe), f"run.directory={directory}", f"run.seed={seed}", *SHARED),
                *(*overrides, "run.steps=0", "--overwrite"),
            ]
            _checked(train(arguments, directory.with_suffix(".log")), directory)
    return directory


def climb(out: Path, seed: int, rung: Rung, recipe: Path, overrides: Sequence[str], train: Train) -> Cell:
    """One cell: kept where it is finished, continued where it was begun, else begun from the seed's warm start.

    Raises:
        RequestError: the finished cell was made with other settings than the recipe's present ones, or another command
            is at work on it.
        RunError: the run failed.
    """
    directory = out / f"seed{seed}" / rung.recipe
    marker = directory.with_suffix(".yaml")  # the recipe of a finished cell
    own = [f"run.directory={directory}", f"run.seed={seed}", *SHARED, *overrides]
    wanted = dump_recipe(load_recipe(recipe, own))
    with _claimed(directory):
        if not check_finished(marker, wanted):
            if not directory.exists():
                copy = directory.with_name(f".{directory.name}.new")
                shutil.rmtree(copy, ignore_errors=True)
                shutil.copytree(out / f"seed{seed}" / "warm", copy)
                replace_folder(copy, directory)
            arguments = [str(recipe), *own, "--resume"]
            _checked(train(arguments, directory.with_suffix(".log")), directory)
            write_text_atomically(marker, wanted)
    return read_cell(directory, seed, rung)


def run_ladder(
    out: Path,
    seeds: Sequence[int],
    overrides: Sequence[str],
    train: Train,
    *,
    jobs: int,
    rungs: Sequence[Rung] = RUNGS,
    recipes: Path = RECIPES,
    warm: Path | None = None,
) -> tuple[list[Cell], list[str]]:
    """All cells, `jobs` at a time, seed after seed; and a line for each that failed. `recipes`: the rungs' folder;
    `warm`: the recipe of the warm starts, the first rung's if None."""
    recipe_of = {rung: recipes / f"{rung.recipe}.yaml" for rung in rungs}
    start_recipe = warm or recipe_of[rungs[0]]
    cells: list[Cell] = []
    failures: list[str] = []
    with ThreadPoolExecutor(jobs) as pool, _nothing_more_after_an_error(pool):
        starts = {seed: pool.submit(warm_start, out, seed, start_recipe, overrides, train) for seed in seeds}
        ready = []
        for seed, start in starts.items():
            try:
                start.result()
                ready.append(seed)
                print(f"{_now()} seed {seed}: warm start ready", flush=True)
            except (RequestError, RunError) as error:
                failures.append(f"seed {seed}, warm start: {error}")
        runs = {(s, r): pool.submit(climb, out, s, r, recipe_of[r], overrides, train) for s in ready for r in rungs}
        for (seed, rung), run in runs.items():
            try:
                cells.append(run.result())
                print(f"{_now()} seed {seed}, {rung.name}: {cells[-1].summary()}", flush=True)
            except (RequestError, RunError) as error:
                failures.append(f"seed {seed}, {rung.name}: {error}")
                print(f"{_now()} {failures[-1]}", file=sys.stderr, flush=True)
    return cells, failures


def run_given(
    given: argparse.Namespace, *, rungs: Sequence[Rung] = RUNGS, recipes: Path = RECIPES, warm: Path | None = None
) -> tuple[list[Cell], list[str]]:
    """`run_ladder` as a command line says (`options`), each training a process."""

    def train(arguments: list[str], log: Path) -> int:
        return run_train(arguments, log, limit_s=given.cell_limit_s)

    return run_ladder(
        given.out, given.seeds, given.set, train, jobs=given.jobs, rungs=rungs, recipes=recipes, warm=warm
    )


@contextmanager
def _nothing_more_after_an_error(pool: ThreadPoolExecutor) -> Iterator[None]:
    try:
        yield
    except BaseException:  # Ctrl-C: what runs stops by itself, what waits is not begun
        pool.shutdown(wait=False, cancel_futures=True)
        raise


@contextmanager
def _claimed(directory: Path) -> Iterator[None]:
    """Keep other commands away from a run directory; the claim ends with this process at the latest."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.with_suffix(".lock"), "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"{directory}: another command is at work on it; wait or use another --out") from None
        yield


def _checked(code: int, directory: Path) -> None:
    if code == 0:
        return
    log = directory.with_suffix(".log")
    told = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    why = "ran past --cell-limit-s" if code == 124 else f"exit code {code}"
    raise RunError("\n".join([f"{why}; the end of {log}:", *told[-5:]]))


def _now() -> str:
    return time.strftime("%H:%M:%S")


def options(description: str, *, name: str, cell_limit_s: float) -> argparse.ArgumentParser:
    """What a command that fills a table of cells is told; the table lies in runs/{name} by default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=Path("runs") / name)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=int, default=2, help="cells at a time, one thread each")
    parser.add_argument("--cell-limit-s", type=float, default=cell_limit_s)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY.SUB=VALUE", help="settings changed in every cell")
    return parser


def conclude(cells: Sequence[Cell], failures: Sequence[str], out: Path, *, name: str, **table: Any) -> None:
    """Write {name}.csv, .md and .png of the cells there are, and print the table, made with the settings `table`.

    Raises:
        RunError: the lines of the cells that failed.
    """
    if cells:
        text = table_markdown(cells, **table)
        write_text_atomically(out / f"{name}.csv", rows_csv(cells))
        write_text_atomically(out / f"{name}.md", text)
        draw_curves(cells, out / f"{name}.png")
        print(text)
    if failures:
        raise RunError("\n".join(failures))


def main() -> None:
    given = options(__doc__.splitlines()[0], name="ladder", cell_limit_s=3600.0).parse_args()
    cells, failures = run_given(given)
    conclude(cells, failures, given.out, name="ladder")


if __name__ == "__main__":
    with exit_with_message():
        main()
