"""Students of a judge by the number of cases that they learn from, with hard and soft targets: table, rows and curves.

python tools/judge_sizes.py judge-train.parquet --cases judge-held-out.parquet -o runs/judge-sizes \\
    [--sizes 64 --sizes 256] [--targets hard] [--prompt wording.txt] [--set model.dtype=bf16]
Each cell is a run of recipes/methods/judge-distil.yaml, or of another recipe of one supervised stage, on the cell's own
examples. Finished cells of the same settings are kept, so the command can be stopped and started again.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dapo_megatron.config import load_recipe  # noqa: E402
from dapo_megatron.config.reward import Judge  # noqa: E402
from dapo_megatron.errors import RequestError, RunError, exit_with_message  # noqa: E402
from dapo_megatron.files import write_text_atomically  # noqa: E402
from dapo_megatron.judging.calibration import calibrate, read_cases  # noqa: E402
from dapo_megatron.judging.export import examples_of  # noqa: E402
from dapo_megatron.judging.hostile import count_fooled  # noqa: E402
from dapo_megatron.judging.sizes import HEADINGS, Student, nested, rows_of, students  # noqa: E402
from dapo_megatron.rewards.judge import open_judge  # noqa: E402
from dapo_megatron.rewards.judge_prompt import PROMPT, check_wording, read_wording  # noqa: E402
from dapo_megatron.rewards.judge_records import Judged, first_of_each, read_judged  # noqa: E402
from tools.ladder import run_train  # noqa: E402

RECIPE = ROOT / "recipes" / "methods" / "judge-distil.yaml"
Train = Callable[[list[str], Path], int]


def sizes(
    collected: Annotated[list[Path], typer.Argument(help="Files that reward.judge.collect wrote.")],
    cases: Annotated[Path, typer.Option(help="Held-out cases with a truth: .parquet, .jsonl, .json.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for cells, sizes.json, .md and .png.")],
    sizes: Annotated[list[int], typer.Option(help="Cases to learn from; may be repeated.")] = (64, 256, 1024),
    targets: Annotated[list[str], typer.Option(help="hard, soft; may be repeated.")] = ("hard", "soft"),
    truth_column: Annotated[str | None, typer.Option(help="Of the held-out cases; by default the verdict.")] = None,
    recipe: Annotated[Path, typer.Option(help="Recipe of a student, with one supervised stage.")] = RECIPE,
    override: Annotated[list[str], typer.Option("--set", help="key.sub=value of the recipe; may be repeated.")] = (),
    prompt: Annotated[Path | None, typer.Option(help="File with the text of reward.judge.prompt.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn.")] = 0,
    limit_s: Annotated[float, typer.Option(min=1, help="Longest time of one training (seconds).")] = 1800.0,
) -> None:
    """Train students on more and more cases, and hold all of them to the truth."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    cells = students(targets, sizes)
    data = read_cases(cases, truth_column=truth_column)
    wording = read_wording(prompt) or PROMPT
    check_wording(wording)
    learned = set(data.cases)
    rows = list(first_of_each(row for path in collected for row in read_judged(path)).values())
    if seen := sum(row.case in learned for row in rows):
        raise RequestError(f"{seen} of the cases in --cases {cases} are learned from; hold others out")
    chosen = nested(rows, [cell.size for cell in cells], seed)

    def train(arguments: list[str], log: Path) -> int:
        return run_train(arguments, log, limit_s=limit_s)

    seconds = {
        cell.name: teach(output / cell.name, cell, chosen[cell.size], wording, recipe, override, seed, train)
        for cell in cells
    }
    # asked as they were taught
    chat_template = load_recipe(recipe, list(override)).data.chat_template
    judges = {}
    for cell in cells:
        folder = str(output / cell.name / "run" / "hf")
        judges[cell.name] = open_judge(Judge(model=folder, prompt=wording, chat_template=chat_template), None)
    report = {"data": str(cases), "seconds": seconds, **calibrate(data, judges)}
    report["hostile"] = count_fooled(data.cases, judges)
    conclude(report, cells, output)


def teach(
    folder: Path,
    cell: Student,
    rows: Sequence[Judged],
    wording: str,
    recipe: Path,
    overrides: Sequence[str],
    seed: int,
    train: Train,
) -> float:
    """Train one student, unless it is there already; returns the seconds that it took.

    Raises:
        RequestError: the recipe has not one supervised stage. RunError: training failed; its log is named.
    """
    examples = folder / "train.jsonl"
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in examples_of(rows, cell.targets, wording, seed))
    settings = {"recipe": recipe.read_text(encoding="utf-8"), "set": list(overrides), "examples": text}
    done = folder / "done.json"
    if done.exists() and (found := json.loads(done.read_text(encoding="utf-8")))["settings"] == settings:
        return found["seconds"]
    done.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(examples, text)
    started = time.perf_counter()
    arguments = [str(recipe), *train_settings(recipe, folder, examples, overrides), "--overwrite"]
    if code := train(arguments, folder / "train.log"):
        what = "ran past --limit-s" if code == 124 else f"ended with code {code}"
        raise RunError(f"training {cell.name} {what}; log: {folder / 'train.log'}")
    seconds = round(time.perf_counter() - started, 1)
    write_text_atomically(done, json.dumps({"seconds": seconds, "settings": settings}) + "\n")
    print(f"{cell.name}: trained in {seconds} s", flush=True)
    return seconds


def train_settings(recipe: Path, folder: Path, examples: Path, overrides: Sequence[str]) -> list[str]:
    """What a cell changes in the recipe, which may have changes of the user's own.

    Raises:
        RequestError: as `load_recipe`; not one supervised stage.
    """
    stages = load_recipe(recipe, list(overrides)).supervised.stages
    if len(stages) != 1:
        raise RequestError(f"{recipe} has {len(stages)} supervised stages; a student's recipe has one")
    stage = stages[0].model_dump() | {"data": str(examples), "weight_column": "weight"}
    return [*overrides, f"supervised.stages={json.dumps([stage])}", f"run.directory={folder / 'run'}", *QUIET]


QUIET = ("monitoring.tensorboard=false", "monitoring.report=false")


def conclude(report: dict[str, Any], cells: Sequence[Student], output: Path) -> None:
    """Write and print what was found."""
    from dapo_megatron.judging.sizes_figure import draw_sizes

    write_text_atomically(output / "sizes.json", json.dumps(report, indent=1) + "\n")
    lines = [HEADINGS, tuple("---" for _ in HEADINGS), *rows_of(report, cells)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_text_atomically(output / "sizes.md", table)
    draw_sizes(report, cells, output / "sizes.png")
    fooled = ", ".join(f"{name} {counts['fooled']}" for name, counts in report["hostile"].items())
    print(f"{report['cases']} held-out cases\n{table}fooled by hostile answers, of 84: {fooled}")
    print(f"report:  {output / 'sizes.json'}\npicture: {output / 'sizes.png'}")


if __name__ == "__main__":
    with exit_with_message():
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(sizes)
        app()
