"""`dapo-megatron plan`: what a recipe will need and take, or with --resharding what moving its weights will cost,
computed for a world that need not exist.

Reads the recipe and, where it is there, config.json; no weights and no torch.
"""

import time
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from dapo_megatron.config import Architecture, Layout, Recipe, check_recipe, derive_layout
from dapo_megatron.config.derive import derive_engines
from dapo_megatron.errors import RequestError
from dapo_megatron.methods import check_methods
from dapo_megatron.planning.plan import RunPlan, plan_run
from dapo_megatron.planning.search import nearest_fit
from dapo_megatron.planning.weights import ITEMSIZE
from dapo_megatron.planning.words import plan_as_json, print_run
from dapo_megatron.prepare import planned_architecture
from dapo_megatron.resharding.hf_layout import whole_layout
from dapo_megatron.resharding.layout import WeightLayout
from dapo_megatron.resharding.megatron_layout import megatron_layout
from dapo_megatron.resharding.messages import messages_of
from dapo_megatron.resharding.minimum import minimum_elements
from dapo_megatron.resharding.plan import make_plan
from dapo_megatron.resharding.summary import PlanSummary, Spread, summarise
from dapo_megatron.resharding.vllm_layout import vllm_layout

__all__ = ["as_json", "judge", "plan_resharding", "print_plan", "print_run", "verdict_as_json"]

LINK_GBPS = (100.0, 200.0, 400.0)  # of one rank, where the command line names none


@dataclass(frozen=True)
class Verdict:
    """A recipe's plan, None where its sizes do not go together; why it cannot run, a line each; settings that make it
    fit, None where it fits or none are found."""

    plan: RunPlan | None
    problems: tuple[str, ...]
    suggestion: dict[str, Any] | None

    def check(self) -> None:
        """Raise RequestError for a recipe that does not fit, with the nearest layout that does."""
        if not self.problems:
            return
        nearest = "no layout of up to 8 times as many ranks fits"
        if self.suggestion is not None:
            nearest = f"the nearest layout that fits: {' '.join(overrides_of(self.suggestion))}"
        raise RequestError("\n".join((*self.problems, nearest)))


def judge(recipe: Recipe, *, prompt: float | None = None, response: float | None = None) -> Verdict:
    """Plan a run and search for what fits where it does not.

    Args:
        prompt, response: mean lengths (tokens); None assumes them.

    Raises:
        RequestError: what no layout would mend: the model folder, methods, settings that contradict each other.
    """
    architecture = planned_architecture(recipe, folder_needed=False)
    check_recipe(recipe, architecture)
    check_methods(recipe)
    try:
        derive_layout(recipe, architecture)
    except RequestError as error:
        return Verdict(None, tuple(str(error).splitlines()), nearest_fit(recipe, architecture))
    busiest = plan_resharding(recipe).summary.busiest_link_bytes
    found = plan_run(recipe, architecture, busiest_link_bytes=busiest, prompt=prompt, response=response)
    problems = found.memory.problems
    return Verdict(found, problems, nearest_fit(recipe, architecture) if problems else None)


def verdict_as_json(verdict: Verdict) -> dict[str, Any]:
    """One object of plain values: docs/planning.md."""
    return {
        "fits": not verdict.problems,
        "problems": list(verdict.problems),
        "suggestion": verdict.suggestion,
        **plan_as_json(verdict.plan),
    }


def overrides_of(settings: dict[str, Any]) -> list[str]:
    """`key.sub=value` as the command line takes it."""
    return [f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in settings.items()]


@dataclass(frozen=True)
class ReshardingPlan:
    """The numbers of one recipe; `plan_seconds`: both layouts, the plan and its messages, on one core."""

    architecture: Architecture
    layout: Layout
    target: str
    dtype: str
    summary: PlanSummary
    plan_seconds: float


def plan_resharding(recipe: Recipe) -> ReshardingPlan:
    """Plan the weight transfer of a recipe.

    Raises:
        RequestError: the model folder, or sizes that do not divide.
        RunError: the layouts do not fit each other.
    """
    architecture = planned_architecture(recipe, folder_needed=False)
    layout = derive_layout(recipe, architecture)
    itemsize = ITEMSIZE[recipe.model.dtype]
    started = time.perf_counter()
    layer_spec = "transformer_engine" if recipe.model.layer_spec == "transformer_engine" else "local"
    source = megatron_layout(architecture, layout, layer_spec=layer_spec)
    target, told = _target(recipe, architecture, layout)
    plan = make_plan(source, target)
    messages = messages_of(plan, itemsize=itemsize, bucket_bytes=recipe.resharding.bucket_mib << 20)
    seconds = time.perf_counter() - started
    summary = summarise(
        plan,
        messages,
        source_ranks=source.placements,
        destination_ranks=target.placements,
        minimum_elements=sum(minimum_elements(source, target).values()),
        itemsize=itemsize,
    )
    return ReshardingPlan(architecture, layout, told, recipe.model.dtype, summary, seconds)


def as_json(found: ReshardingPlan, link_gbps: tuple[float, ...]) -> dict[str, Any]:
    """One object of plain values; seconds by link speed under `seconds_at_gbps`."""
    return {
        **asdict(found.summary),
        "ratio": found.summary.ratio,
        "plan_seconds": found.plan_seconds,
        "seconds_at_gbps": {f"{speed:g}": found.summary.seconds_at(speed) for speed in link_gbps},
        "learner_ranks": found.layout.world,
        "target": found.target,
        "dtype": found.dtype,
    }


def print_plan(found: ReshardingPlan, link_gbps: tuple[float, ...]) -> None:
    """The table for people, on standard output."""
    summary, layout = found.summary, found.layout
    table = Table(title="resharding plan", title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    learner = f"{layout.world} ranks: tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}"
    rows = [
        ("learner", learner + (f", virtual {layout.virtual_pipeline}" if layout.virtual_pipeline > 1 else "")),
        ("engines", found.target),
        ("between processes", f"{_size(summary.bytes_total)} ({found.dtype})"),
        ("minimum", f"{_size(summary.bytes_minimum)}, ratio {summary.ratio:.4f}"),
        ("inside processes", _size(summary.bytes_copied)),
        ("sent, a source rank", _spread(summary.sent)),
        ("received, a destination rank", _spread(summary.received)),
        ("messages", f"{summary.messages}, {summary.direct_messages} of them from storage to storage"),
        ("packed (strided)", _size(summary.packed_bytes)),
        ("coalesced (small)", _size(summary.coalesced_bytes)),
        *(
            (f"links of {speed:g} Gbit/s", f"at least {summary.seconds_at(speed):.3g} s, packing not counted")
            for speed in link_gbps
        ),
        ("planned in", f"{found.plan_seconds:.2f} s"),
    ]
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _target(recipe: Recipe, a: Architecture, layout: Layout) -> tuple[WeightLayout, str]:
    if recipe.rollout.engine == "hf":
        return whole_layout(a, range(layout.world)), "hf: the whole model in each learner rank"
    tensor, engines = recipe.rollout.tensor, derive_engines(recipe, layout, cpu=recipe.learner.device == "cpu")
    target = vllm_layout(a, engines=engines, tensor=tensor, first_rank=layout.world)
    return target, f"vllm: {engines} x tensor {tensor}"


def _spread(spread: Spread) -> str:
    return f"{_size(spread.least)} to {_size(spread.most)}, mean {_size(spread.mean)}"


def _size(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"
