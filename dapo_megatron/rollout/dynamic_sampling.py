"""Dynamic sampling (DAPO, arXiv 2503.14476, section 3.2): sample prompts in waves until enough groups carry a signal.

A group whose answers are all right or all wrong has advantage 0 everywhere; it is dropped, and further prompts take its
place. Mixed groups beyond the wanted number are kept for the next step, so that none is wasted:

    mixed groups generated + carried in = trained + kept + aged
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dapo_megatron.algorithms.advantages import select_groups
from dapo_megatron.config.algorithm import DynamicSampling
from dapo_megatron.data.completions import PromptGroup

LEAST_ACCEPTANCE = 0.05  # a wave is never planned for fewer mixed groups than this share


@dataclass(frozen=True)
class SampledStep:
    """`trained`: groups to learn from, at most as many as wanted; the first `reused` were kept from earlier steps.

    generated: all groups of all waves, in order. kept: surplus mixed groups, for the next step. aged: groups carried in
    that were too old. shortfall: groups missing after the last wave. acceptance: the running share of mixed groups.
    """

    trained: list[PromptGroup]
    generated: list[PromptGroup]
    waves: int
    kept: list[PromptGroup] = field(default_factory=list)
    reused: int = 0
    aged: int = 0
    shortfall: int = 0
    acceptance: float = 1.0


def sample_step(
    generate: Callable[[int, int], list[PromptGroup]],
    settings: DynamicSampling,
    *,
    wanted: int,
    step: int = 0,
    surplus: Sequence[PromptGroup] = (),
    acceptance: float = 1.0,
) -> SampledStep:
    """Take `surplus` groups of at most `settings.max_age` steps, oldest first, then call `generate(number of prompts,
    wave)` until `wanted` groups are mixed, at most `settings.max_waves` times.

    A wave asks for wanted · over_sampling prompts; an adaptive one for missing / acceptance if that is fewer.
    acceptance: the running share of mixed groups, half of it this step's. After the last wave the step trains on what
    it has. Disabled: one wave, every group is trained on.
    """
    if not settings.enabled:
        groups = generate(wanted, 0)
        return SampledStep(groups, groups, 1, acceptance=acceptance)
    young = [group for group in surplus if step - group.step <= settings.max_age]
    mixed, generated = list(young), []
    most = math.ceil(wanted * settings.over_sampling)
    wave = found = 0
    while len(mixed) < wanted and wave < settings.max_waves:
        needed = math.ceil((wanted - len(mixed)) / max(acceptance, LEAST_ACCEPTANCE))
        groups = generate(min(most, needed) if settings.adaptive else most, wave)
        wave += 1
        generated.extend(groups)
        new = [group for group in groups if is_mixed(group, settings.metric)]
        mixed.extend(new)
        found += len(new)
    if generated:
        acceptance = (acceptance + found / len(generated)) / 2
    return SampledStep(
        trained=mixed[:wanted],
        generated=generated,
        waves=wave,
        kept=mixed[wanted:] if settings.keep_surplus else [],
        reused=min(len(young), wanted),
        aged=len(surplus) - len(young),
        shortfall=max(0, wanted - len(mixed)),
        acceptance=acceptance,
    )


def is_mixed(group: PromptGroup, metric: str) -> bool:
    """Whether the group carries a signal by `algorithm.dynamic_sampling.metric`."""
    return bool(select_groups(metric, group.accuracies[None], group.rewards[None])[0])
