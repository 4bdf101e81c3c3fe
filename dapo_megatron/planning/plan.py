"""The plan of a recipe: layout, memory, time, in one value."""

from dataclasses import dataclass

from dapo_megatron.config import Architecture, Layout, Recipe, derive_layout
from dapo_megatron.config.derive import derive_engines
from dapo_megatron.planning.memory import Memory, plan_memory
from dapo_megatron.planning.seconds import StepTime, step_time
from dapo_megatron.planning.workload import Workload, workload_of


@dataclass(frozen=True)
class RunPlan:
    """Everything that `dapo-megatron plan` tells of a recipe whose sizes divide. `devices`: of learner and engines."""

    recipe: Recipe
    architecture: Architecture
    layout: Layout
    work: Workload
    memory: Memory
    time: StepTime
    devices: int
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return not self.memory.problems

    @property
    def gpu_hours(self) -> float:
        """Of all run.steps steps; validation, checkpoints and start are not counted."""
        return self.recipe.run.steps * self.time.seconds * self.devices / 3600


def plan_run(
    recipe: Recipe,
    a: Architecture,
    *,
    busiest_link_bytes: float | None = None,
    crossing_bytes: float | None = None,
    prompt: float | None = None,
    response: float | None = None,
) -> RunPlan:
    """Plan a run.

    Args:
        busiest_link_bytes, crossing_bytes: of the weight transfer, as in `step_time`.
        prompt, response: mean lengths (tokens); None as in `workload_of`.

    Raises:
        RequestError: sizes that do not divide.
    """
    layout = derive_layout(recipe, a)
    vllm, cpu = recipe.rollout.engine == "vllm", recipe.learner.device == "cpu"
    engines = derive_engines(recipe, layout, cpu=cpu) if vllm else layout.world
    work = workload_of(recipe, layout, prompt=prompt, response=response)
    apart = vllm and recipe.rollout.placement == "disaggregated"
    links = {"busiest_link_bytes": busiest_link_bytes, "crossing_bytes": crossing_bytes}
    time = step_time(recipe, a, layout, work, engines=engines, **links)
    devices = layout.world + (engines * recipe.rollout.tensor if apart else 0)
    memory = plan_memory(recipe, a, layout)
    notes = tuple(_notes(recipe, work, prompt, response))
    return RunPlan(recipe, a, layout, work, memory, time, devices, notes)


def _notes(recipe: Recipe, work: Workload, prompt: float | None, response: float | None) -> list[str]:
    found = []
    if prompt is None or response is None:
        found.append(
            f"assumed: prompts of {work.prompt:.0f} and responses of {work.response:.0f} tokens in the mean; "
            "say better with --mean-prompt and --mean-response"
        )
    if work.drawn > work.trained:
        found.append(f"assumed: half of all groups are mixed, so {work.drawn:.0f} responses are drawn a step")
    if recipe.learner.device != "cpu":
        found.append("rates are shares of data-sheet peaks that no run of this code on GPUs has measured yet")
    return found
