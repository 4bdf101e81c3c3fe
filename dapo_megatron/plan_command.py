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
from dapo_megatron.config.derive import derive_engines, engine_owners
from dapo_megatron.errors import RequestError
from dapo_megatron.methods import check_methods
from dapo_megatron.planning.activations import attention_of, spec_of
from dapo_megatron.planning.plan import RunPlan, plan_run
from dapo_megatron.planning.search import nearest_fit
from dapo_megatron.planning.weights import ITEMSIZE
from dapo_megatron.planning.words import plan_as_json, print_run
from dapo_megatron.prepare import planned_architecture
from dapo_megatron.resharding.hf_layout import whole_layout
from dapo_megatron.resharding.layout import WeightLayout
from dapo_megatron.resharding.megatron_layout import megatron_layout
from dapo_megatron.resharding.messages import messages_of
from dapo_megatron.resharding.minimum import minimum_crossing, minimum_elements
from dapo_megatron.resharding.plan import make_plan
from dapo_megatron.resharding.relay_schedule import relay_rounds
from dapo_megatron.resharding.summary import CrossingSummary, PlanSummary, Spread, summarise, summarise_crossing
from dapo_megatron.resharding.topology import Topology, topology_of
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
        moved = plan_resharding(recipe)
    except RequestError as error:
        return Verdict(None, tuple(str(error).splitlines()), nearest_fit(recipe, architecture))
    found = plan_run(
        recipe,
        architecture,
        busiest_link_bytes=moved.summary.busiest_link_bytes if moved.crossing is None else moved.summary.received.most,
        crossing_bytes=None if moved.crossing is None else moved.crossing.busiest_rank_bytes,
        prompt=prompt,
        response=response,
    )
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
    """The numbers of one recipe; `plan_seconds`: both layouts, the plan and its messages, on one core. `crossing`: None
    but for engines beside the learner on several machines."""

    architecture: Architecture
    layout: Layout
    target: str
    dtype: str
    summary: PlanSummary
    crossing: CrossingSummary | None
    plan_seconds: float


def plan_resharding(recipe: Recipe) -> ReshardingPlan:
    """Plan the weight transfer of a recipe.

    Raises:
        RequestError: the model folder, sizes that do not divide, engines that would leave their node.
        RunError: the layouts do not fit each other.
    """
    architecture = planned_architecture(recipe, folder_needed=False)
    layout = derive_layout(recipe, architecture)
    itemsize = ITEMSIZE[recipe.model.dtype]
    started = time.perf_counter()
    source = megatron_layout(architecture, layout, layer_spec=spec_of(attention_of(recipe)))
    target, told = _target(recipe, architecture, layout)
    topology = _topology(recipe, layout)
    plan = make_plan(source, target, topology)
    bucket = recipe.resharding.bucket_mib << 20
    messages = messages_of(plan, itemsize=itemsize, bucket_bytes=bucket)
    rounds, several = (), topology is not None and len(set(topology.machines)) > 1
    if several:
        window = recipe.resharding.window
        rounds = relay_rounds(plan, topology, itemsize=itemsize, bucket_bytes=bucket, most_operations=window)
    seconds = time.perf_counter() - started
    summary = summarise(
        plan,
        messages,
        source_ranks=source.placements,
        destination_ranks=target.placements,
        minimum_elements=sum(minimum_elements(source, target).values()),
        itemsize=itemsize,
    )
    crossing = None
    if several:
        least = sum(minimum_crossing(source, target, topology).values())
        crossing = summarise_crossing(plan, rounds, topology, minimum_elements=least, itemsize=itemsize)
    return ReshardingPlan(architecture, layout, told, recipe.model.dtype, summary, crossing, seconds)


def as_json(found: ReshardingPlan, link_gbps: tuple[float, ...]) -> dict[str, Any]:
    """One object of plain values; seconds by link speed under `seconds_at_gbps`, between machines where there are
    several with engines beside the learner."""
    timed = found.crossing or found.summary
    return {
        **asdict(found.summary),
        "crossing": None if found.crossing is None else asdict(found.crossing),
        "ratio": found.summary.ratio,
        "plan_seconds": found.plan_seconds,
        "seconds_at_gbps": {f"{speed:g}": timed.seconds_at(speed) for speed in link_gbps},
        "learner_ranks": found.layout.world,
        "target": found.target,
        "dtype": found.dtype,
    }


def print_plan(found: ReshardingPlan, link_gbps: tuple[float, ...]) -> None:
    """The table for people, on standard output."""
    summary, layout, timed = found.summary, found.layout, found.crossing or found.summary
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
        *(_message_rows(summary) if found.crossing is None else _crossing_rows(found.crossing)),
        *(
            (f"links of {speed:g} Gbit/s", f"at least {timed.seconds_at(speed):.3g} s, packing not counted")
            for speed in link_gbps
        ),
        ("planned in", f"{found.plan_seconds:.2f} s"),
    ]
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _message_rows(summary: PlanSummary) -> list[tuple[str, str]]:
    return [
        ("sent, a source rank", _spread(summary.sent)),
        ("received, a destination rank", _spread(summary.received)),
        ("messages", f"{summary.messages}, {summary.direct_messages} of them from storage to storage"),
        ("packed (strided)", _size(summary.packed_bytes)),
        ("coalesced (small)", _size(summary.coalesced_bytes)),
    ]


def _crossing_rows(crossing: CrossingSummary) -> list[tuple[str, str]]:
    return [
        ("machines", str(crossing.machines)),
        ("between machines", _size(crossing.bytes_crossing)),
        ("minimum of that", _size(crossing.bytes_minimum)),
        ("sent to machines, a rank", _spread(crossing.sent)),
        ("received, a rank", _spread(crossing.received)),
        ("parcels", f"{crossing.parcels} in {crossing.rounds} rounds"),
        ("copied on a worker's device", _size(crossing.bytes_on_devices)),
        ("from devices beside it", _size(crossing.bytes_beside)),
    ]


def _topology(recipe: Recipe, layout: Layout) -> Topology | None:
    """Where ranks and workers will stand: neighbours fill a node; None unless workers share the learner's GPUs."""
    rollout = recipe.rollout
    if not rollout.beside_learner or recipe.learner.device == "cpu" or recipe.resharding.transport == "group":
        return None
    count, world = derive_engines(recipe, layout, cpu=False), layout.world
    owners = engine_owners(count, tensor=rollout.tensor, world=world)
    nodes = [rank // recipe.hardware.gpus_per_node for rank in range(world)]
    return topology_of(nodes, owners, tensor=rollout.tensor, devices=True)


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
