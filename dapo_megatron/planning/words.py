"""A run's plan for people and as JSON."""

from typing import Any

from rich.console import Console
from rich.table import Table

from dapo_megatron.planning.hardware import gigabytes
from dapo_megatron.planning.plan import RunPlan
from dapo_megatron.resharding.megatron_layout import position_of

NAMES = {"activations": "activations (with the layer at work)", "update": "gradients on their way, optimizer at work"}


def plan_as_json(found: RunPlan | None) -> dict[str, Any]:
    """Plain values; every key is there, null without a plan. Bytes, seconds, tokens."""
    if found is None:
        keys = ("bottleneck", "memory_bytes", "memory_by_phase", "card", "card_bytes", "seconds", "seconds_by_part")
        keys += ("pipeline_bubble", "tokens_per_step", "gpu_hours", "devices", "layout", "ranks", "notes")
        return dict.fromkeys(keys)
    memory, time, layout = found.memory, found.time, found.layout
    stage = memory.stages[memory.fullest]
    return {
        "bottleneck": time.bottleneck,
        "memory_bytes": memory.parts,
        "memory_by_phase": {"learn": stage.learn, "rollout": stage.rollout},
        "card": memory.card.name,
        "card_bytes": memory.card.memory,
        "seconds": {**{name: phase.seconds for name, phase in time.phases.items()}, "step": time.seconds},
        "seconds_by_part": {name: phase.parts for name, phase in time.phases.items()},
        "pipeline_bubble": time.bubble,
        "tokens_per_step": found.work.trained_tokens,
        "gpu_hours": found.gpu_hours,
        "devices": found.devices,
        "layout": {
            "world": layout.world,
            "tensor": layout.tensor,
            "pipeline": layout.pipeline,
            "virtual_pipeline": layout.virtual_pipeline,
            "context": layout.context,
            "data": layout.data,
            "engines": time.engines,
        },
        "ranks": [_rank(found, rank) for rank in range(layout.world)],
        "notes": list(found.notes),
    }


def print_run(found: RunPlan) -> None:
    """The tables, on standard output."""
    console, layout, memory, time = Console(), found.layout, found.memory, found.time
    told = f"tensor {layout.tensor} x pipeline {layout.pipeline} x data {layout.data}"
    if layout.virtual_pipeline > 1:
        told += f", virtual {layout.virtual_pipeline}"
    if layout.context > 1:
        told += f", context {layout.context}"
    console.print(f"{found.recipe.run.name}: {layout.world} ranks of {memory.card.name}, {told}", markup=False)
    console.print("pipeline stages, GB of the fullest rank:")
    stages = Table()
    for column in ("stage", "ranks", "layers", "learning", "sampling"):
        stages.add_column(column, justify="left" if column in ("ranks", "layers") else "right")
    size = layout.world // layout.pipeline
    for i, stage in enumerate(memory.stages):
        layers = ", ".join(f"{first}-{last}" for first, last in _layers(found, i))
        stages.add_row(
            str(i),
            f"{i * size}-{(i + 1) * size - 1}",
            layers,
            gigabytes(stage.learn, digits=2),
            gigabytes(stage.rollout, digits=2),
        )
    console.print(stages)
    console.print(f"memory of stage {memory.fullest}, GB a rank:")
    parts = Table(show_header=False)
    for name, count in memory.parts.items():
        if count:
            name = NAMES.get(name, name)
            parts.add_row(name.replace("_", " "), gigabytes(count, digits=2))
    if memory.card.memory is not None:
        parts.add_row("[bold]card[/bold]", gigabytes(memory.card.memory, digits=2))
    console.print(parts)
    console.print("a rollout step:")
    phases = Table()
    for column in ("phase", "seconds", "most of it"):
        phases.add_column(column, justify="right" if column == "seconds" else "left")
    for name, phase in time.phases.items():
        phases.add_row(name, _seconds(phase.seconds), max(phase.parts, key=phase.parts.__getitem__))
    phases.add_row("step", _seconds(time.seconds), "")
    console.print(phases)
    for line in (
        f"tokens trained on a step: {found.work.trained_tokens:,}",
        f"pipeline bubble of the update: {time.bubble:.1%}",
        f"bottleneck: {time.bottleneck}",
        f"{found.recipe.run.steps} steps: {_span(found.gpu_hours / found.devices)}; {found.gpu_hours:,.0f} hours of "
        f"{found.devices} devices together",
        f"fits: {'yes' if found.fits else 'no'}",
        *found.notes,
    ):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _seconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _span(hours: float) -> str:
    if hours < 2:
        return f"{60 * hours:.1f} minutes"
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:,.1f} days"


def _rank(found: RunPlan, rank: int) -> dict[str, Any]:
    layout = found.layout
    position = position_of(rank, layout)
    return {
        "rank": rank,
        "node": rank // found.recipe.hardware.gpus_per_node,
        "tensor": position.tensor,
        "context": rank // layout.tensor % layout.context,
        "data": rank // (layout.tensor * layout.context) % layout.data,
        "pipeline": position.pipeline,
        "layers": [list(span) for span in _layers(found, position.pipeline)],
    }


def _layers(found: RunPlan, pipeline: int) -> list[tuple[int, int]]:
    """(first, last) layer of each chunk of a pipeline stage, from 0."""
    layout = found.layout
    starts = [(v * layout.pipeline + pipeline) * layout.layers_per_chunk for v in range(layout.virtual_pipeline)]
    return [(start, start + layout.layers_per_chunk - 1) for start in starts]
