"""PPO, DPO, iterative DPO and DAPO on a task whose responses can all be listed: where each puts its probability.

Each seed makes one warm start, which all methods continue; every checkpoint is scored on all responses in fp64.
Finished cells are kept; a cell that was killed goes on from its last checkpoint.

    python tools/solvable.py [--out runs/solvable] [--seeds 1 2 3] [--jobs 2] [--cell-limit-s 1800]
                             [--set key.sub=value ...]
"""

import csv
import io
import json
import statistics
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, fields
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import matplotlib  # noqa: E402
import torch  # noqa: E402
from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from torch import Tensor  # noqa: E402

from dapo_megatron.conversion.command import convert  # noqa: E402
from dapo_megatron.data.tokenizer import load_tokenizer  # noqa: E402
from dapo_megatron.errors import RunError, exit_with_message  # noqa: E402
from dapo_megatron.files import atomic_path, write_text_atomically  # noqa: E402
from dapo_megatron.monitoring.report_figure import COLOURS, STYLE  # noqa: E402
from tools.ladder import options, run_given  # noqa: E402
from tools.ladder_table import Rung, spread  # noqa: E402
from tools.placed_recipes import placed_recipes  # noqa: E402
from tools.solvable_exact import Masses, every_response, masses, response_logprobs  # noqa: E402
from tools.solvable_task import MOST_TOKENS, PROMPTS, is_right, write_task  # noqa: E402

RECIPES = ROOT / "recipes" / "methods" / "solvable"
METHODS = (Rung("dpo", "DPO"), Rung("iterative-dpo", "iterative DPO"), Rung("ppo", "PPO"), Rung("dapo", "DAPO"))
START = "ppo"  # with a critic and a reference, so that every method may go on from it
COLUMNS = {
    "reward": "expected reward",
    "right": "right",
    "chosen": "on chosen responses",
    "rejected": "on rejected responses",
    "outside": "outside the pairs",
    "outside_wrong": "outside and wrong",
    "cut": "cut",
    "kl": "KL to the start (nats)",
}
MOST = "outside and wrong, most on the way"
PANELS = ("reward", "rejected", "outside", "outside_wrong")


@dataclass(frozen=True)
class Row:
    """One checkpoint."""

    method: Rung
    seed: int
    step: int
    masses: Masses


@dataclass(frozen=True)
class Space:
    """The task as arrays over [prompts, responses], for `masses`."""

    prompt_tokens: list[list[int]]
    end: int
    sets: dict[str, Tensor]


def read_space(folder: Path) -> Space:
    """The responses to every question of a task that `write_task` wrote: which are right, chosen, rejected, cut."""
    tokenizer = load_tokenizer(folder / "tokenizer")
    end = tokenizer.eos_token_id
    responses = every_response(len(tokenizer), end, MOST_TOKENS)
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    ended = [response[-1] == end for response in responses]

    def held(prompt: str, column: str) -> list[bool]:
        those = {row[column] for row in pairs if row["prompt"] == prompt}
        return [whole and text in those for text, whole in zip(texts, ended, strict=True)]

    right = torch.tensor([[is_right(prompt, text) for text in texts] for prompt in PROMPTS])
    sets = {
        "rewards_PR": torch.where(right, 1.0, -1.0).double(),
        "right_PR": right,
        "chosen_PR": torch.tensor([held(prompt, "chosen") for prompt in PROMPTS]),
        "rejected_PR": torch.tensor([held(prompt, "rejected") for prompt in PROMPTS]),
        "cut_R": ~torch.tensor(ended),
    }
    return Space([tokenizer.encode(prompt) for prompt in PROMPTS], end, sets)


def score_checkpoint(checkpoint: Path, space: Space) -> Tensor:
    """log-probs of all responses, fp64 [prompts, responses], under the policy of a checkpoint."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    with TemporaryDirectory() as scratch:
        with redirect_stdout(io.StringIO()):
            convert("megatron-to-hf", checkpoint, Path(scratch) / "hf")
        model = AutoModelForCausalLM.from_pretrained(Path(scratch) / "hf", dtype=torch.float64, local_files_only=True)
    return response_logprobs(model.eval(), space.prompt_tokens, end=space.end, most_tokens=MOST_TOKENS)


def score_run(directory: Path, method: Rung, seed: int, space: Space) -> list[Row]:
    """A row a checkpoint of a finished cell; that of step 0 is the start.

    Raises:
        RunError: the checkpoint of step 0 is gone.
    """
    folders = sorted((directory / "checkpoints").glob("step-*"))
    steps = [int(folder.name.removeprefix("step-")) for folder in folders]
    if not steps or steps[0] != 0:
        raise RunError(f"{directory}: the checkpoint of step 0 is gone; remove the cell and its .yaml, and run again")
    scores = [score_checkpoint(folder, space) for folder in folders]
    return [
        Row(method, seed, step, masses(logprobs, scores[0], **space.sets))
        for step, logprobs in zip(steps, scores, strict=True)
    ]


def table_markdown(rows: Sequence[Row]) -> str:
    """A row a method after its last step: mean ± standard deviation over seeds (one seed: the value). The last column
    is the most over all checkpoints."""
    lines = ["| method | seeds | " + " | ".join([*COLUMNS.values(), MOST]) + " |", "|---" * (len(COLUMNS) + 3) + "|"]
    cells: dict[Rung, dict[int, list[Row]]] = {}
    for row in sorted(rows, key=lambda row: (METHODS.index(row.method), row.seed, row.step)):
        cells.setdefault(row.method, {}).setdefault(row.seed, []).append(row)
    start: dict[int, list[Row]] = {seed: [of[0]] for by_seed in cells.values() for seed, of in by_seed.items()}
    for name, by_seed in [("start", start), *((method.name, of) for method, of in cells.items())]:
        entries = [spread([getattr(of[-1].masses, column) for of in by_seed.values()], ".3f") for column in COLUMNS]
        entries.append(spread([max(row.masses.outside_wrong for row in of) for of in by_seed.values()], ".3f"))
        lines.append(f"| {name} | {len(by_seed)} | {' | '.join(entries)} |")
    return "\n".join(lines) + "\n"


def rows_csv(rows: Sequence[Row]) -> str:
    """A row a checkpoint."""
    names = [field.name for field in fields(Masses)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "seed", "step", *names])
    for row in rows:
        numbers = [f"{getattr(row.masses, name):.6f}" for name in names]
        writer.writerow([row.method.recipe, row.seed, row.step, *numbers])
    return text.getvalue()


def draw_curves(rows: Sequence[Row], path: Path) -> None:
    """Four panels over rollout steps: a line a method (mean over seeds), in a band of all seeds."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}), atomic_path(path) as temporary:
        figure = Figure(figsize=(16, 4.4), dpi=70, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(PANELS))
        for place, column in zip(axes, PANELS, strict=True):
            place.set_title(COLUMNS[column].capitalize())
            place.set_xlabel("rollout step")
            place.set_ylabel("−1 … 1" if column == "reward" else "probability")
            for colour, method in zip(COLOURS, METHODS, strict=False):
                by_step: dict[int, list[float]] = {}
                for row in rows:
                    if row.method == method:
                        by_step.setdefault(row.step, []).append(getattr(row.masses, column))
                steps = sorted(by_step)
                means = [statistics.fmean(by_step[step]) for step in steps]
                place.plot(steps, means, color=colour, label=method.name)
                low, high = ([pick(by_step[step]) for step in steps] for pick in (min, max))
                place.fill_between(steps, low, high, color=colour, alpha=0.12, lw=0)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside upper center", ncols=len(METHODS))
        figure.savefig(temporary, format="png", pil_kwargs={"optimize": True})


def main() -> None:
    given = options(__doc__.splitlines()[0], name="solvable", cell_limit_s=1800.0).parse_args()
    torch.set_num_threads(1)
    write_task(given.out / "data")
    recipes = placed_recipes(RECIPES, METHODS, given.out)
    cells, failures = run_given(given, rungs=METHODS, recipes=recipes, warm=recipes / f"{START}.yaml")
    space = read_space(given.out / "data")
    rows = [
        row
        for cell in cells
        for row in score_run(given.out / f"seed{cell.seed}" / cell.rung.recipe, cell.rung, cell.seed, space)
    ]
    if rows:
        table = table_markdown(rows)
        write_text_atomically(given.out / "solvable.csv", rows_csv(rows))
        write_text_atomically(given.out / "solvable.md", table)
        draw_curves(rows, given.out / "solvable.png")
        print(table)
    if failures:
        raise RunError("\n".join(failures))


if __name__ == "__main__":
    with exit_with_message():
        main()
