"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): sample prompts in waves until enough groups carry a signal.

A group whose answers are all right or all wrong has advantage 0 everywhere; it is dropped, and further prompts take its
place.
"""

from collections.abc import Callable
from dataclasses import dataclass

from dapo_megatron.algorithms.advantages import select_groups
from dapo_megatron.data.completions import PromptGroup


@dataclass(frozen=True)
class SampledStep:
    """`trained`: groups to learn from, at most as many as wanted. `generated`: all groups of all waves, in order."""

    trained: list[PromptGroup]
    generated: list[PromptGroup]
    waves: int


def sample_step(
    generate: Callable[[int, int], list[PromptGroup]],
    *,
    wanted: int,
    enabled: bool,
    max_waves: int,
    metric: str,
) -> SampledStep:
    """Call `generate(number of prompts, wave)` until `wanted` groups are mixed, at most `max_waves` times.

    After the last wave the step trains on what it has. Disabled: one wave, every group is kept.
    """
    if not enabled:
        groups = generate(wanted, 0)
        return SampledStep(groups, groups, 1)
    trained: list[PromptGroup] = []
    generated: list[PromptGroup] = []
    for wave in range(max_waves):
        groups = generate(wanted, wave)
        generated.extend(groups)
        trained.extend(g for g, mixed in zip(groups, _mixed(groups, metric), strict=True) if mixed)
        if len(trained) >= wanted:
            break
    return SampledStep(trained[:wanted], generated, wave + 1)


def _mixed(groups: list[PromptGroup], metric: str) -> list[bool]:
    return [bool(select_groups(metric, g.accuracies[None], g.rewards[None])[0]) for g in groups]
