"""A recipe's ranks on nodes: how many of each, and what cannot be. No torch."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from dapo_megatron.config import Recipe
from dapo_megatron.config.problems import show
from dapo_megatron.errors import RequestError

TIME = re.compile(r"(?:([0-9]+)-)?([0-9]{1,3}):([0-5][0-9]):([0-5][0-9])")
# what may stand unquoted in a line of options; more than slurm's own names need would invite mistakes
NAME = re.compile(r"[\w.@+,:&|*()\[\]/-]+")
PATH = re.compile(r"[\w./@+:=-]+")
IMAGE = re.compile(r"[\w./@+:#=-]+")
OPTION = re.compile(r"--[a-z][\w-]*(=[^\s'\"]+)?")
ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=[\w./,:@+=^-]*")
LINE = re.compile(r"[^\n\r]*\S[^\n\r]*")
OWN_OPTIONS = ("nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem", "exclusive", "time", "signal",
               "requeue", "no-requeue", "open-mode", "job-name", "output", "error", "array", "partition", "account",
               "qos", "reservation", "constraint", "ntasks", "chdir")  # fmt: skip


@dataclass(frozen=True)
class Placement:
    """Where the ranks of a job lie: `tasks_per_node` on each of `nodes`, which show each all `gpus_per_node`."""

    nodes: int
    tasks_per_node: int
    gpus_per_node: int
    seconds: int  # time limit

    @property
    def world(self) -> int:
        """Ranks in all."""
        return self.nodes * self.tasks_per_node


def place_ranks(recipe: Recipe) -> Placement:
    """The placement of a recipe's section `slurm`.

    Raises:
        RequestError: every rule that is broken, one a line: the world that nodes make is not the layout's, more ranks
            than GPUs, a time limit that leaves no time, text that a batch file cannot hold.
    """
    slurm, parallel = recipe.slurm, recipe.parallel
    product = parallel.tensor * parallel.pipeline * parallel.context
    wanted = parallel.world or product
    on_cpu = recipe.learner.device == "cpu"
    gpus = slurm.gpus_per_node
    if gpus is None:
        gpus = 0 if on_cpu else min(recipe.hardware.gpus_per_node, parallel.world or recipe.hardware.gpus_per_node)
    tasks = slurm.tasks_per_node or gpus or max(1, wanted // (slurm.nodes or 1))
    nodes = slurm.nodes or -(-(parallel.world or tasks) // tasks)
    placement = Placement(nodes, tasks, gpus, _seconds(slurm.time_limit) or 0)
    problems = [*_world_problems(recipe, placement, product), *_time_problems(recipe), *_text_problems(recipe)]
    if on_cpu and gpus:
        problems.append(f"slurm.gpus_per_node={gpus} with learner.device=cpu asks for GPUs to leave idle; use 0")
    if recipe.learner.device == "cuda" and not gpus:
        problems.append("slurm.gpus_per_node=0 with learner.device=cuda leaves ranks without a GPU; use 1 or more")
    if gpus and tasks > gpus:
        problems.append(f"slurm.tasks_per_node={tasks} ranks share slurm.gpus_per_node={gpus}; use {gpus} or fewer")
    if problems:
        raise RequestError("\n".join(problems))
    return placement


def _world_problems(recipe: Recipe, placement: Placement, product: int) -> Iterator[str]:
    nodes, tasks, world = placement.nodes, placement.tasks_per_node, placement.world
    told = f"slurm.nodes={nodes} x slurm.tasks_per_node={tasks} = {world} ranks"
    asked = recipe.parallel.world
    if asked is not None and asked != world:
        fits = f"slurm.nodes={asked // tasks} or " if asked % tasks == 0 else ""
        yield f"{told}, but parallel.world={asked}; use {fits}parallel.world={world}"
    elif world % product:
        parallel = recipe.parallel
        fits = next(n for n in range(nodes, nodes + product + 1) if n * tasks % product == 0)
        yield (
            f"{told}, which is not a multiple of {product} = parallel.tensor {parallel.tensor} x parallel.pipeline "
            f"{parallel.pipeline} x parallel.context {parallel.context}; use slurm.nodes={fits}"
        )


def _time_problems(recipe: Recipe) -> Iterator[str]:
    slurm = recipe.slurm
    seconds = _seconds(slurm.time_limit)
    if seconds is None:
        yield (
            f"slurm.time_limit={show(slurm.time_limit)} is neither hours:minutes:seconds nor "
            'days-hours:minutes:seconds; use for example "24:00:00"'
        )
    elif seconds <= slurm.stop_before_s:
        yield (
            f"slurm.stop_before_s={slurm.stop_before_s} leaves a job of slurm.time_limit={slurm.time_limit} no time to "
            f"train; use at most {max(1, seconds // 2)}"
        )


def _text_problems(recipe: Recipe) -> Iterator[str]:
    slurm = recipe.slurm
    single = [
        (
            "run.directory",
            recipe.run.directory,
            PATH,
            "the batch file's options hold letters, digits and ./@+:=-_ only",
        ),
        ("slurm.memory", slurm.memory, re.compile(r"[0-9]+[KMGT]?"), 'use for example "900G", or "0" for all of it'),
        ("slurm.container_image", slurm.container_image, IMAGE, "an image has no blanks and no quotes"),
    ]
    names = ("partition", "account", "qos", "reservation", "constraint")
    single += [
        (f"slurm.{name}", getattr(slurm, name), NAME, "slurm's names have no blanks or quotes") for name in names
    ]
    for key, pattern, rule in (
        ("options", OPTION, "an option is --name or --name=value without blanks and quotes"),
        ("container_mounts", PATH, "a mount is SOURCE:TARGET without blanks and quotes"),
        ("setup", LINE, "each entry is one line of shell"),
        (
            "environment",
            ASSIGNMENT,
            "each is NAME=value without blanks and quotes; anything else goes into slurm.setup",
        ),
    ):
        single += [(f"slurm.{key}[{i}]", text, pattern, rule) for i, text in enumerate(getattr(slurm, key))]
    for name, text, pattern, rule in single:
        if text is not None and not pattern.fullmatch(text):
            yield f"{name}={show(text)}: {rule}"
    for i, option in enumerate(slurm.options):
        name = option.removeprefix("--").partition("=")[0]
        if name in OWN_OPTIONS:
            yield f"slurm.options[{i}]={show(option)}: --{name} follows from the recipe's other settings; remove it"


def _seconds(time_limit: str) -> int | None:
    """Seconds of slurm's [days-]hours:minutes:seconds; None if it is something else."""
    match = TIME.fullmatch(time_limit)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds
