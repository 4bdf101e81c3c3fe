"""Planned beside measured: layouts drawn from what recipes allow, real learner updates in real ranks on this machine.

    python tools/plan_against_measured.py [--seed N] [--layouts N] [--only N ...] [--explain N] [--output FILE]

Every layout gets a recipe of its own: a model, parallel sizes, recomputation, fused output layer, token budget, dtype,
optimizer in host memory or cut over ranks, a critic or none. Those that a recipe may not have, that plan less than
200 MB or more than 350 MB a rank, or that this CPU would take too long for are drawn again. What is measured is told in
`learner_memory.py`; what is planned, in docs/planning.md. Exit code 1 where a rank's peak is not within 10 % of its
plan; seconds are reported, and nothing is asked of them.
"""

import argparse
import json
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from dapo_megatron.config import Architecture, Layout, Recipe, check_recipe, derive_layout  # noqa: E402
from dapo_megatron.config.architecture import architecture_from_dict  # noqa: E402
from dapo_megatron.config.derive import derive_critic_layout  # noqa: E402
from dapo_megatron.config.load import build_recipe  # noqa: E402
from dapo_megatron.data.packing import assign_micro_batches  # noqa: E402
from dapo_megatron.errors import RequestError, RunError, exit_with_message  # noqa: E402
from dapo_megatron.launch import World, die_with_parent, free_port  # noqa: E402
from dapo_megatron.planning.hardware import LINKS, MEMORY, PRODUCTS, Card  # noqa: E402
from dapo_megatron.planning.memory import plan_memory  # noqa: E402
from dapo_megatron.planning.seconds import step_time  # noqa: E402
from dapo_megatron.planning.weights import model_parameters  # noqa: E402
from dapo_megatron.planning.workload import Workload  # noqa: E402
from dapo_megatron.resharding.megatron_layout import position_of  # noqa: E402
from tools.bench_record import machine, print_table, write_rows  # noqa: E402

RANKS = 4  # at most
SMALLEST, LARGEST = 200e6, 350e6  # planned bytes of the fullest rank
LONGEST_S = 6.0  # of an update, estimated
ESTIMATED_RATE = {"fp32": 40e9, "bf16": 3e9}  # products and sums a second of two cores, for the draw alone
BOUND = 0.10
PROMPT_SHARE = 8  # of a sequence's tokens, one in so many is its prompt's
COMPUTE = ("activations", "logits", "update")
PARTS = ("parameters", "gradients", "optimizer", "critic", *COMPUTE)


@dataclass(frozen=True)
class Case:
    """One layout: the settings of its recipe, config.json of its model, (prompt, response) tokens of each sequence."""

    settings: dict[str, Any]
    model: dict[str, Any]
    lengths: list[tuple[int, int]]

    @property
    def recipe(self) -> Recipe:
        return build_recipe(self.settings)

    @property
    def architecture(self) -> Architecture:
        return architecture_from_dict(self.model, "the drawn model")

    @property
    def layout(self) -> Layout:
        return derive_layout(self.recipe, self.architecture)


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
    compute_error: float | None
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


def drawn_cases(seed: int) -> Iterator[Case]:
    """Layouts without end, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        case = _allowed(_drawn(rng), rng)
        if case is not None:
            yield case


def _drawn(rng: random.Random) -> Case:
    """A model and a recipe, allowed or not."""
    family = rng.choice(["qwen2", "qwen3", "llama"])
    head_dim = rng.choice([32, 64, 128])
    heads = rng.choice([2, 4, 6, 8, 12])
    dtype = rng.choice(["fp32", "fp32", "bf16"])
    hidden = heads * head_dim if family != "qwen3" else rng.choice([256, 384, 512, 768])
    model = {
        "model_type": family, "hidden_size": hidden, "num_hidden_layers": rng.choice([1, 2, 4, 6, 8]),
        "num_attention_heads": heads, "num_key_value_heads": rng.choice([n for n in (1, 2, 4, 8) if heads % n == 0]),
        "head_dim": head_dim, "intermediate_size": rng.choice([2, 3, 4, 5]) * 4 * (hidden // 4),
        "vocab_size": rng.choice([1000, 4096, 10000, 16384, 32000]), "max_position_embeddings": 1 << 16,
        "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": rng.random() < 0.4,
    }  # fmt: skip
    tensor, pipeline, context, data = rng.choice(
        [sizes for sizes in _sizes(RANKS) if sizes != (1, 1, 1, 1)] + [(1, 1, 1, 1)]
    )
    budget = rng.choice([512, 768, 1000, 1536, 2048, 3072, 4096])
    longest = budget // rng.choice([1, 2, 3, 4]) if context > 1 else budget
    critic = rng.random() < 0.25
    prompts = rng.choice([2, 3, 4])
    settings = {
        "run": {"directory": "runs/measured", "seed": rng.randrange(1 << 16)},
        "model": {"path": "drawn", "dtype": dtype},
        "parallel": {
            "tensor": tensor, "pipeline": pipeline, "virtual_pipeline": rng.choice([1, 2]) if pipeline > 1 else 1,
            "context": context, "sequence": tensor > 1 and rng.random() < 0.5,
            "world": tensor * pipeline * context * data,
        },
        "data": {"train": "unread.jsonl", "max_prompt_length": longest // PROMPT_SHARE},
        "rollout": {
            "samples_per_prompt": 1, "prompts_per_step": 1,
            "max_response_length": longest - longest // PROMPT_SHARE, "engine": "hf",
        },
        "algorithm": {
            "mini_batch_prompts": 1, "advantage": "gae" if critic else "group",
            "dynamic_sampling": {"enabled": False},
        },
        "optimizer": {"distributed": rng.random() < 0.75},
        "learner": {
            "device": "cpu", "tokens_per_micro_batch": budget,
            "recompute": rng.choice(["none", "none", "selective", "full"]),
            "fused_linear_loss": rng.random() < 0.4, "offload_optimizer": rng.random() < 0.25,
        },
    }  # fmt: skip
    if critic and rng.random() < 0.5 and tensor > 1:
        settings["critic"] = {"parallel": {"tensor": 1}}
    packs = prompts * (pipeline if settings["parallel"]["virtual_pipeline"] > 1 else 1)
    lengths = _lengths(rng, packs * data, data, budget)
    if context > 1:  # masks grow with the square of a length, and plans are for the greatest
        lengths = [_parts(longest)] * (packs * data * (budget // longest))
    settings["rollout"]["prompts_per_step"] = settings["algorithm"]["mini_batch_prompts"] = len(lengths)
    return Case(settings, model, lengths)


def _sizes(ranks: int) -> list[tuple[int, int, int, int]]:
    sizes = range(1, ranks + 1)
    return [(t, p, c, d) for t in sizes for p in sizes for c in sizes for d in sizes if t * p * c * d <= ranks]


def _lengths(rng: random.Random, packs: int, data: int, budget: int) -> list[tuple[int, int]]:
    """Sequences of an eighth to two thirds of the budget that fill so many packs of it, all but a few hundredths."""
    shares = []
    while sum(shares) < packs:
        shares.append(rng.uniform(1 / 8, 2 / 3))
    for filled in (0.99, 0.97, 0.95, 0.92, 0.88, 0.8):
        scale = filled * packs / sum(shares)
        lengths = [min(budget, max(16, int(share * scale * budget))) for share in shares]
        assigned = assign_micro_batches(lengths, token_budget=budget, data_parallel=data)
        if len(assigned[0]) * data <= packs:
            break
    return [_parts(length) for length in lengths]


def _parts(length: int) -> tuple[int, int]:
    """(prompt, response) of a sequence."""
    prompt = max(1, length // PROMPT_SHARE)
    return prompt, length - prompt


def _allowed(case: Case, rng: random.Random) -> Case | None:
    """The case, if a recipe may be so and it is neither too small nor too large for this machine."""
    try:
        recipe, a = case.recipe, case.architecture
        layout = derive_layout(recipe, a)
        check_recipe(recipe, a)
        if recipe.algorithm.advantage == "gae":
            derive_critic_layout(recipe, a, layout.world)
    except RequestError:
        return None
    planned = max(planned_bytes(recipe, a, layout, rank) for rank in range(layout.world))
    tokens = sum(prompt + response for prompt, response in case.lengths)
    models = 2 if recipe.algorithm.advantage == "gae" else 1
    seconds = 8 * model_parameters(a) * tokens * models / ESTIMATED_RATE[recipe.model.dtype]
    return case if SMALLEST <= planned <= LARGEST and seconds <= LONGEST_S else None


def planned_bytes(recipe: Recipe, a: Architecture, layout: Layout, rank: int) -> int:
    """Planned peak of a rank's learner; the embedded engine, which the tool does not start, left out."""
    stage = plan_memory(recipe, a, layout).stages[position_of(rank, layout).pipeline]
    return stage.learn - stage.engine.weights


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


def show(rows: Sequence[Row]) -> None:
    """One line a layout: its rank with the largest error, and seconds of the slowest."""
    lines = []
    for number in sorted({row.layout for row in rows}):
        own = [row for row in rows if row.layout == number]
        worst = max(own, key=lambda row: abs(row.error))
        part = max(own, key=lambda row: abs(row.compute_error or 0))
        update = max(own, key=lambda row: row.measured_update_s)
        lines.append(
            (
                str(number), worst.model, worst.cut, worst.settings, str(worst.tokens_per_micro_batch),
                f"{worst.planned_bytes / 1e6:.1f}", f"{worst.measured_bytes / 1e6:.1f}", f"{worst.error:+.1%}",
                f"{part.planned_compute / 1e6:.1f}", f"{part.measured_compute / 1e6:.1f}", f"{part.compute_error:+.1%}",
                f"{update.planned_score_s:.2f} / {update.measured_score_s:.2f}",
                f"{update.planned_update_s:.2f} / {update.measured_update_s:.2f}",
            )
        )  # fmt: skip
    heads = (
        "layout", "model", "cut", "settings", "tokens", "planned MB", "measured MB", "error", "compute", "measured",
        "error", "score s", "update s",
    )  # fmt: skip
    print_table(heads, lines, left=4)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layouts", type=int, default=6)
    parser.add_argument("--only", type=int, nargs="+", help="run these of the drawn layouts alone, from 0")
    parser.add_argument("--list", action="store_true", help="show what would be run")
    parser.add_argument("--explain", type=int, default=0, metavar="N", help="N lines a rank of what lies at its peak")
    parser.add_argument("--output", type=Path, help="a CSV file with a row a rank")
    options = parser.parse_args(arguments)
    cases, facts = drawn_cases(options.seed), machine(os.getloadavg()[0])
    rows: list[Row] = []
    for number in range(options.layouts):
        case = next(cases)
        if options.only and number not in options.only:
            continue
        told = f"{number}: {model_of(case.architecture)}, {cut_of(case.layout)}, {switches_of(case.recipe, case)}"
        planned = max(planned_bytes(case.recipe, case.architecture, case.layout, r) for r in range(case.layout.world))
        print(f"{told}, {planned / 1e6:.0f} MB planned", flush=True)
        if options.list:
            continue
        found = run_case(case, explain=options.explain)
        own = compare(case, found, seed=options.seed, number=number)
        for row, measured in zip(own, found, strict=True):
            parts = ", ".join(
                f"{part} {getattr(row, f'planned_{part}') / 1e6:.1f}/{getattr(row, f'measured_{part}') / 1e6:.1f}"
                for part in PARTS
                if getattr(row, f"measured_{part}") or getattr(row, f"planned_{part}")
            )
            print(f"   rank {row.rank}: {row.error:+.1%} in {row.fullest}: {parts}")
            print("\n".join(measured["held"]), flush=True)
        rows += [replace(row, **facts) for row in own]
    if not rows:
        return 0
    show(rows)
    if options.output:
        write_rows(rows, options.output)
    beyond = [row for row in rows if abs(row.error) > BOUND]
    for row in beyond:
        print(f"beyond {BOUND:.0%}: layout {row.layout}, rank {row.rank}: {row.error:+.1%}")
    return 1 if beyond else 0


if __name__ == "__main__":
    with exit_with_message():
        sys.exit(main())
