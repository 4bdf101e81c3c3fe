"""megatron's process groups. It knows one cut of the world, in globals of `parallel_state`; here there may be several,
for models that are cut differently over the same ranks, and one of them is in force."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from dapo_megatron.config import Layout
from dapo_megatron.learner import megatron_cpu

megatron_cpu.install()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel import get_cuda_rng_tracker, model_parallel_cuda_manual_seed  # noqa: E402

BUFFER = "_GLOBAL_MEMORY_BUFFER"  # used within a call, so one serves all cuts
GLOBALS = [name for name in vars(parallel_state) if re.fullmatch(r"_[A-Z][A-Z_]*", name) and name != BUFFER]

_in_force: "ParallelGroups | None" = None


class ParallelGroups:
    """The groups of one cut of the world, and the states of megatron's random-number tracker that belong to it."""

    def __init__(self, layout: Layout) -> None:
        """What is in force, as formed for `layout`."""
        self._cut = _cut(layout)
        self._keep()

    def serve(self, layout: Layout) -> bool:
        """Whether the layout cuts the world as they do."""
        return _cut(layout) == self._cut

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Inside, megatron works on these groups, in all threads; afterwards on those before. May be nested."""
        before = _in_force
        _put_in_force(self)
        try:
            yield
        finally:
            _put_in_force(before)

    def _keep(self) -> None:
        self._values = {name: getattr(parallel_state, name) for name in GLOBALS}
        self._random_states = get_cuda_rng_tracker().get_states()

    def _put_back(self) -> None:
        vars(parallel_state).update(self._values)
        get_cuda_rng_tracker().set_states(self._random_states)


def groups_in_force() -> ParallelGroups | None:
    """Those that megatron works on now; None before any are formed."""
    return _in_force


def form_groups(layout: Layout, *, seed: int, time_limit_s: float) -> ParallelGroups:
    """Tensor-, pipeline- and data-parallel groups for the layout, and the random-number tracker, in force from now on;
    earlier ones are destroyed. Collective over the world."""
    global _in_force
    forget_groups()
    _in_force = _form(layout, seed, time_limit_s)
    return _in_force


def form_groups_beside(layout: Layout, *, seed: int, time_limit_s: float) -> ParallelGroups:
    """Groups for a second model, to be put in force where it is used: those in force if the layout cuts the world as
    they do, else new ones. Collective over the world; after `form_groups`."""
    first = _in_force
    if first.serve(layout):
        return first
    first._keep()
    buffer = getattr(parallel_state, BUFFER)
    unset = {name: {} if isinstance(value, dict) else None for name, value in first._values.items()}
    vars(parallel_state).update(unset, **{BUFFER: None})
    try:
        return _form(layout, seed, time_limit_s)
    finally:
        setattr(parallel_state, BUFFER, buffer)
        first._put_back()


def forget_groups() -> None:
    """Destroy all groups, where formed: a gloo group left behind keeps three threads polling for ever."""
    global _in_force
    _in_force = None
    for group in parallel_state._global_process_group_list or ():
        if group is not None:  # None stands for the default group
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()


def _form(layout: Layout, seed: int, time_limit_s: float) -> ParallelGroups:
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        distributed_timeout_minutes=max(1, round(time_limit_s / 60)),
    )
    model_parallel_cuda_manual_seed(seed)
    return ParallelGroups(layout)


def _cut(layout: Layout) -> tuple[int, ...]:
    return layout.world, layout.tensor, layout.pipeline, layout.virtual_pipeline, layout.context


def _put_in_force(groups: ParallelGroups) -> None:
    global _in_force
    if groups is not _in_force:
        _in_force._keep()
        groups._put_back()
        _in_force = groups
