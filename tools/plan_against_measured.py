"""Planned beside measured: layouts drawn from what recipes allow, real learner updates in real ranks on this machine.

    python tools/plan_against_measured.py [--seed N ...] [--layouts N] [--only N ...] [--explain N] [--output FILE]
    python tools/plan_against_measured.py --document FILE      put a file's table into docs/planning.md

Every layout gets a recipe of its own: a model, parallel sizes, recomputation, fused output layer, token budget, dtype,
optimizer in host memory or cut over ranks, a critic or none. Those that a recipe may not have, that plan less than
200 MB or more than 350 MB a rank, or that this CPU would take too long for are drawn again. What is measured is told in
`learner_memory.py`; what is planned, in docs/planning.md. Exit code 1 where a rank's peak is not within 10 % of its
plan; seconds are reported, and nothing is asked of them.
"""

import argparse
import csv
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from dapo_megatron.config import Architecture, Layout, Recipe  # noqa: E402
from dapo_megatron.errors import RunError, exit_with_message  # noqa: E402
from dapo_megatron.files import write_text_atomically  # noqa: E402
from dapo_megatron.launch import World, die_with_parent, free_port  # noqa: E402
from dapo_megatron.planning.hardware import LINKS, MEMORY, PRODUCTS, Card  # noqa: E402
from dapo_megatron.planning.memory import plan_memory  # noqa: E402
from dapo_megatron.planning.seconds import step_time  # noqa: E402
from dapo_megatron.planning.workload import Workload  # noqa: E402
from dapo_megatron.resharding.megatron_layout import position_of  # noqa: E402
from tools.bench_record import machine, print_table, write_rows  # noqa: E402
from tools.drawn_layouts import Case, drawn_cases, planned_bytes  # noqa: E402

DOCUMENT = ROOT / "docs" / "planning.md"
MARKS = ("<!-- measured begins -->", "<!-- measured ends -->")
BOUND = 0.10
COMPUTE = ("activations", "logits", "update")
PARTS = ("parameters", "gradients", "optimizer", "critic", *COMPUTE)


@dataclass(frozen=True)
class Row:
    """One rank of one layout. Bytes, seconds; `*_error`: planned / measured - 1."""

    seed: int
    layout: int
    rank: int
    model: str
    cut: str
    settings: str
    tokens_per_micro_batch: int
    planned_bytes: int
    measured_bytes: int
    error: float
    planned_compute: int
    measured_compute: int
    compute_error: float
    at_rest_bytes: int
    planned_parameters: int
    measured_parameters: int
    planned_gradients: int
    measured_gradients: int
    planned_optimizer: int
    measured_optimizer: int
    planned_critic: int
    measured_critic: int
    planned_activations: int
    measured_activations: int
    planned_logits: int
    measured_logits: int
    planned_update: int
    measured_update: int
    fullest: str
    planned_sampling: int
    measured_sampling: int
    planned_score_s: float
    measured_score_s: float
    planned_update_s: float
    measured_update_s: float
    planned_critic_s: float | None
    measured_critic_s: float | None
    rate_products: float
    rate_memory: float
    rate_link: float
    machine: str = ""
    cores: int = 0
    load: float = 0.0
    commit: str = ""


def run_case(case: Case, *, explain: int = 0, time_limit_s: float = 600.0) -> list[dict[str, Any]]:
    """`learner_memory.measure` of every rank, in processes forked from one that has imported what they need.

    Raises:
        RunError: a rank failed, or all together took longer than the limit.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tools.learner_memory", "tools.plan_against_measured"])
    port, answers = free_port(), context.SimpleQueue()
    ranks = [
        context.Process(target=_rank, args=(case, explain, rank, port, answers), daemon=True)
        for rank in range(case.layout.world)
    ]
    found: dict[int, dict[str, Any]] = {}
    deadline = time.monotonic() + time_limit_s
    try:
        for rank in ranks:
            rank.start()
        while len(found) < len(ranks):
            while not answers.empty():
                answer = json.loads(answers.get())
                found[answer["rank"]] = answer
            if any(rank.exitcode for rank in ranks) or time.monotonic() > deadline:
                raise RunError(f"a rank of the layout {cut_of(case.layout)} failed or took over {time_limit_s:g} s")
            time.sleep(0.05)
        return [found[i] for i in range(len(ranks))]
    finally:
        for rank in ranks:
            if rank.pid is not None:
                rank.join(5)
                rank.kill()


def _rank(case: Case, explain: int, rank: int, port: int, answers: Any) -> None:
    import torch

    from dapo_megatron.learner.distributed import join_world, leave_world
    from tools.learner_memory import measure

    die_with_parent()
    os.environ.update(OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    recipe, layout = case.recipe, case.layout
    join_world(World(rank, layout.world, rank), device=torch.device("cpu"), time_limit_s=recipe.learner.time_limit_s)
    found = measure(recipe, case.architecture, layout, case.lengths, explain=explain)
    answers.put(json.dumps(found))
    leave_world()


def compare(case: Case, found: Sequence[dict[str, Any]], *, seed: int, number: int) -> list[Row]:
    """A row a rank."""
    recipe, a, layout = case.recipe, case.architecture, case.layout
    memory = plan_memory(recipe, a, layout)
    rows = []
    for rank, measured in enumerate(found):
        stage = memory.stages[position_of(rank, layout).pipeline]
        seconds = planned_seconds(case, measured["rates"])
        planned = {
            **asdict(stage.state), "critic": stage.critic, "activations": stage.activations, "logits": stage.logits,
            "update": stage.update,
        }  # fmt: skip
        compute, measured_compute = (sum(of[part] for part in COMPUTE) for of in (planned, measured["parts"]))
        whole = stage.learn - stage.engine.weights
        sampling = stage.rollout - stage.engine.weights - max(0, stage.engine.kv_cache)
        rows.append(
            Row(
                seed, number, rank, model_of(a), cut_of(layout), switches_of(recipe, case),
                recipe.learner.tokens_per_micro_batch, whole, measured["peak"], whole / measured["peak"] - 1,
                compute, measured_compute, compute / measured_compute - 1, measured["at_rest"],
                **{f"planned_{part}": planned[part] for part in PARTS},
                **{f"measured_{part}": measured["parts"][part] for part in PARTS},
                fullest=measured["fullest"], planned_sampling=sampling, measured_sampling=measured["sampling"],
                **{f"planned_{phase}_s": seconds.get(phase) for phase in ("score", "update", "critic")},
                **{f"measured_{phase}_s": measured["seconds"].get(phase) for phase in ("score", "update", "critic")},
                **{f"rate_{name}": rate for name, rate in measured["rates"].items()},
            )
        )  # fmt: skip
    return rows


def planned_seconds(case: Case, rates: dict[str, float]) -> dict[str, float]:
    """Seconds of score, update and critic on a machine of these measured rates: the plan takes shares of peaks, so the
    peaks are those of which the shares are what was measured."""
    recipe, a, layout = case.recipe, case.architecture, case.layout
    link = max(rates["link"], 1.0) / LINKS
    card = Card("this CPU", None, rates["products"] / PRODUCTS, rates["memory"] / MEMORY, link, link)
    prompt, response = (sum(pair[i] for pair in case.lengths) / len(case.lengths) for i in (0, 1))
    work = Workload(prompt, response, recipe.rollout.max_response_length, len(case.lengths), 0.0, 1, 1)
    planned = step_time(recipe, a, layout, work, engines=1, busiest_link_bytes=None, card=card)
    return {name: phase.seconds for name, phase in planned.phases.items()}


def model_of(a: Architecture) -> str:
    """Sizes of a model in a few words."""
    tied = " tied" if a.tied else ""
    return f"{a.family} L{a.layers} h{a.hidden} f{a.ffn} {a.heads}/{a.kv_heads}x{a.head_dim} V{a.vocab}{tied}"


def cut_of(layout: Layout) -> str:
    """t p v c d of a layout, and whether it has sequence parallelism."""
    sizes = {"t": layout.tensor, "p": layout.pipeline, "v": layout.virtual_pipeline, "c": layout.context}
    told = " ".join(f"{name}{size}" for name, size in {**sizes, "d": layout.data}.items() if size > 1)
    return f"{told or 'one rank'}{' sp' if layout.sequence_parallel else ''}"


def switches_of(recipe: Recipe, case: Case) -> str:
    """What else changes memory, in the words of the recipe."""
    learner = recipe.learner
    told = [recipe.model.dtype, f"recompute {learner.recompute}"]
    told += ["fused"] if learner.fused_linear_loss else []
    told += ["offload"] if learner.offload_optimizer else []
    told += [] if recipe.optimizer.distributed else ["whole optimizer"]
    if recipe.algorithm.advantage == "gae":
        own = case.settings.get("critic", {}).get("parallel", {})
        told.append(f"critic{' t1' if own else ''}")
    return ", ".join(told)


COLUMNS = (
    "seed", "layout", "model", "cut", "settings", "tokens", "planned MB", "measured MB", "error", "compute",
    "measured", "error", "score s", "update s",
)  # fmt: skip


def lines_of(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """One line a layout: its rank with the largest error, that with the largest error beside the state, and planned /
    measured seconds of the slowest."""
    lines = []
    for seed, number in sorted({(row.seed, row.layout) for row in rows}):
        own = [row for row in rows if (row.seed, row.layout) == (seed, number)]
        worst = max(own, key=lambda row: abs(row.error))
        part = max(own, key=lambda row: abs(row.compute_error))
        update = max(own, key=lambda row: row.measured_update_s)
        lines.append(
            (
                str(seed), str(number), worst.model, worst.cut, worst.settings, str(worst.tokens_per_micro_batch),
                f"{worst.planned_bytes / 1e6:.1f}", f"{worst.measured_bytes / 1e6:.1f}", f"{worst.error:+.1%}",
                f"{part.planned_compute / 1e6:.1f}", f"{part.measured_compute / 1e6:.1f}", f"{part.compute_error:+.1%}",
                f"{update.planned_score_s:.2f} / {update.measured_score_s:.2f}",
                f"{update.planned_update_s:.2f} / {update.measured_update_s:.2f}",
            )
        )  # fmt: skip
    return lines


def read_rows(path: Path) -> list[Row]:
    """The rows of a CSV file that `--output` wrote."""
    with open(path, newline="", encoding="utf-8") as file:
        records = list(csv.DictReader(file))
    return [Row(**{one.name: _read(one.type, record[one.name]) for one in fields(Row)}) for record in records]


def _read(kind: Any, text: str) -> Any:
    """A cell as `write_rows` writes it."""
    if kind in (int, str):
        return kind(text)
    return float(text) if text else None


def markdown(rows: Sequence[Row]) -> str:
    """The table of docs/planning.md."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *lines_of(rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _told(case: Case, seed: int, number: int, *, explain: int, run: bool) -> list[Row]:
    """Say what the layout is, run it, and say what every rank found."""
    recipe, a, layout = case.recipe, case.architecture, case.layout
    planned = max(planned_bytes(recipe, a, layout, rank) for rank in range(layout.world))
    told = f"{number}: {model_of(a)}, {cut_of(layout)}, {switches_of(recipe, case)}"
    print(f"{told}, {planned / 1e6:.0f} MB planned", flush=True)
    if not run:
        return []
    found = run_case(case, explain=explain)
    rows = compare(case, found, seed=seed, number=number)
    for row, measured in zip(rows, found, strict=True):
        pairs = ((part, getattr(row, f"planned_{part}"), getattr(row, f"measured_{part}")) for part in PARTS)
        parts = ", ".join(f"{part} {one / 1e6:.1f}/{other / 1e6:.1f}" for part, one, other in pairs if one or other)
        print(f"   rank {row.rank}: {row.error:+.1%} in {row.fullest}: {parts}")
        print("\n".join(measured["held"]), end="\n" if measured["held"] else "", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--layouts", type=int, default=6)
    parser.add_argument("--only", type=int, nargs="+", help="run these of the drawn layouts alone, from 0")
    parser.add_argument("--list", action="store_true", help="show what would be run")
    parser.add_argument("--explain", type=int, default=0, metavar="N", help="N lines a rank of what lies at its peak")
    parser.add_argument("--output", type=Path, help="a CSV file with a row a rank")
    parser.add_argument("--document", type=Path, help="run nothing: put the table of such a file into docs/planning.md")
    options = parser.parse_args(arguments)
    if options.document:
        before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(MARKS[0])
        table = markdown(read_rows(options.document))
        write_text_atomically(DOCUMENT, f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")
        return 0
    facts = machine(os.getloadavg()[0])
    rows: list[Row] = []
    for seed in options.seed:
        for number, case in enumerate(islice(drawn_cases(seed), options.layouts)):
            if options.only is None or number in options.only:
                rows += _told(case, seed, number, explain=options.explain, run=not options.list)
    rows = [replace(row, **facts) for row in rows]
    if not rows:
        return 0
    print_table(COLUMNS, lines_of(rows), left=5)
    if options.output:
        write_rows(rows, options.output)
    beyond = [row for row in rows if abs(row.error) > BOUND]
    for row in beyond:
        print(f"beyond {BOUND:.0%}: seed {row.seed}, layout {row.layout}, rank {row.rank}: {row.error:+.1%}")
    return 1 if beyond else 0


if __name__ == "__main__":
    with exit_with_message():
        sys.exit(main())
