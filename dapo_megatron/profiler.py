"""Traces of chosen steps on chosen ranks (`profile`), with the phases of the loop in them.

RUN/profile/step-000003-rank-00000.json.gz         for chrome://tracing, ui.perfetto.dev
RUN/profile/step-000003-rank-00000.memory.pickle   GPU memory, for pytorch.org/memory_viz
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from dapo_megatron.config.profile import Profile
from dapo_megatron.errors import RequestError
from dapo_megatron.phases import Phases

MOST_EVENTS = 1_000_000  # of memory, the latest ones


class Profiler:
    """Records steps of this rank into `folder`; phases that `phases` is told of are named in what is recorded.

    Raises:
        RequestError: the recipe asks for what only a GPU has.
    """

    def __init__(self, settings: Profile, phases: Phases, *, rank: int, device: torch.device, folder: Path) -> None:
        only_cuda = [f"profile.{name}=true" for name in ("memory", "nvtx") if getattr(settings, name)]
        if only_cuda and device.type != "cuda":
            raise RequestError(f"{' and '.join(only_cuda)} needs a GPU, and this run is on a CPU; use false")
        self._settings, self._phases, self._rank, self._folder = settings, phases, rank, folder
        self._on_gpu = device.type == "cuda"
        if settings.nvtx:
            phases.marks.append(torch.cuda.nvtx.range)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around a rollout step, which is recorded if it is chosen, also when it fails."""
        settings = self._settings
        if step not in settings.steps or self._rank not in settings.ranks:
            yield
            return
        name = f"step-{step:06d}-rank-{self._rank:05d}"
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._memory(name) if settings.memory else nullcontext(), self._trace(name):
            yield

    @contextmanager
    def _trace(self, name: str) -> Iterator[None]:
        kinds = torch.profiler.ProfilerActivity
        recorder = torch.profiler.profile(
            activities=[kinds.CPU, kinds.CUDA] if self._on_gpu else [kinds.CPU],
            record_shapes=self._settings.shapes,
            with_stack=self._settings.stacks,
        )
        self._phases.marks.append(torch.profiler.record_function)
        recorder.start()
        try:
            yield
        finally:
            recorder.stop()
            self._phases.marks.remove(torch.profiler.record_function)
            whole = self._folder / f"{name}.json.gz"
            partial = whole.with_name(f".partial-{whole.name}")  # torch goes by the ending
            recorder.export_chrome_trace(str(partial))
            os.replace(partial, whole)

    @contextmanager
    def _memory(self, name: str) -> Iterator[None]:
        torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)
        try:
            yield
        finally:
            whole = self._folder / f"{name}.memory.pickle"
            partial = whole.with_name(f".partial-{whole.name}")
            torch.cuda.memory._dump_snapshot(str(partial))
            torch.cuda.memory._record_memory_history(enabled=None)
            os.replace(partial, whole)
