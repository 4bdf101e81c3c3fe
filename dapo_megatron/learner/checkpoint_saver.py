"""Checkpoints beside training: the training thread copies the state, a thread of this rank's writes it.

The threads of all ranks meet on a gloo group that nothing else uses, so they never mix with training. One save is under
way at a time: the next one waits for it. What fails in a thread is told on all ranks at the next `check` or `wait`.
"""

import threading
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from dapo_megatron.agreement import everyone
from dapo_megatron.config.checkpoint import Checkpoint
from dapo_megatron.data.completions import PromptGroup
from dapo_megatron.errors import RunError
from dapo_megatron.learner.checkpoint_files import Content, write_checkpoint
from dapo_megatron.learner.learner import Learner
from dapo_megatron.learner.manifest import CRITIC, POLICY, REFERENCE, checkpoint_folder, prune
from dapo_megatron.learner.random_states import take_random_states
from dapo_megatron.learner.reference import ReferenceWeights
from dapo_megatron.learner.snapshot import HostMemory, take_snapshot, take_weights
from dapo_megatron.resharding.hf_files import dtype_name

UNTOUCHED = "older checkpoints are untouched"
TOGETHER_S = 60.0  # ranks come this much apart to a wait


class _Writing(threading.Thread):
    """One checkpoint being written."""

    def __init__(self, content: Content, group: dist.ProcessGroup, settings: Checkpoint) -> None:
        super().__init__(name=f"save {content.folder.name}", daemon=True)
        self.content, self.group, self.settings = content, group, settings
        self.failure: str | None = None

    def run(self) -> None:
        folder = self.content.folder
        try:
            write_checkpoint(self.content, self.group)
        except RunError as error:
            self.failure = f"{error}; {UNTOUCHED}"
        except Exception as error:  # told by the training thread
            self.failure = f"checkpoint {folder.name} could not be written: {error or type(error)}; {UNTOUCHED}"
        if self.failure is not None or dist.get_rank() != 0:
            return
        best = self.content.state.get("best") if self.settings.keep_best else None
        try:
            prune(folder.parent, keep=self.settings.keep, best=None if best is None else best["step"])
        except Exception as error:
            self.failure = f"checkpoint {folder.name} is whole, but older ones could not be put in order: {error}"


class CheckpointSaver:
    """Saves a learner, and its critic if there is one, under `run`/checkpoints; `side_files`: a Hugging Face folder
    with the learner's config.json and tokenizer; `critic_files`: the critic's, if it is another.

    Every rank calls every method, `close` apart; all but `close` are collective.
    """

    def __init__(
        self,
        settings: Checkpoint,
        learner: Learner,
        run: Path,
        *,
        side_files: Path,
        critic: Learner | None = None,
        critic_files: Path | None = None,
    ) -> None:
        self._settings, self._run, self._side_files = settings, run, {"hf": side_files}
        if critic is not None and critic_files is not None:
            self._side_files[f"{CRITIC}/hf"] = critic_files
        self._learners = {POLICY: learner} if critic is None else {POLICY: learner, CRITIC: critic}
        parts = (*self._learners, REFERENCE)
        self._memory = {part: HostMemory() if settings.asynchronous else None for part in parts}
        self._group: dist.ProcessGroup | None = None
        self._writing: _Writing | None = None
        self._saved: dict | None = None

    def holds(self, state: dict) -> None:
        """The newest checkpoint is of `state`: it need not be written again."""
        self._saved = state

    def save(self, state: dict, groups: Sequence[PromptGroup] = (), reference: ReferenceWeights | None = None) -> None:
        """Begin a checkpoint of the present weights and optimizer, and of a reference that moves; `state` and `groups`
        as `Content` has them. Returns once the state is copied; without `checkpoint.asynchronous` once it is written.
        Nothing is done when the last checkpoint was of the same state.

        Raises:
            RunError: an earlier checkpoint could not be written, on every rank alike; this one is not begun.
        """
        self.wait()
        if state == self._saved:
            return
        if self._group is None:
            limit = timedelta(seconds=self._settings.time_limit_s)
            self._group = dist.new_group(backend="gloo", timeout=limit)
        learner = self._learners[POLICY]
        builds = {part: take_snapshot(one, self._memory[part]) for part, one in self._learners.items()}
        if reference is not None and reference.moves:
            builds[REFERENCE] = take_weights(learner, reference.values, self._memory[REFERENCE])
        content = Content(
            folder=checkpoint_folder(self._run, state["step"]),
            builds=builds,
            state={**state, "dtype": dtype_name(learner.dtype)},
            random=take_random_states(learner.device, {part: one.groups for part, one in self._learners.items()}),
            groups=list(groups),
            side_files=self._side_files,
        )
        self._saved = state
        self._writing = _Writing(content, self._group, self._settings)
        if self._settings.asynchronous:
            self._writing.start()
        else:
            self._writing.run()
            self._settle(0.0)

    def check(self) -> None:
        """Does not wait for the disk.

        Raises:
            RunError: the checkpoint under way could not be written on some rank; on every rank alike.
        """
        if self._writing is None:
            return
        states = everyone((self._writing.is_alive(), self._writing.failure is not None), dist.get_world_size())
        if any(failed for _, failed in states) or not any(alive for alive, _ in states):
            self._settle(TOGETHER_S)

    def wait(self) -> None:
        """Until the checkpoint under way has its name.

        Raises:
            RunError: it could not be written, or not within `checkpoint.time_limit_s`; on every rank alike.
        """
        if self._writing is not None:
            self._settle(self._settings.time_limit_s + TOGETHER_S)

    def close(self) -> None:
        """Give the checkpoint under way its time, without the other ranks: for the way out after an error."""
        if self._writing is not None and self._writing.is_alive():
            self._writing.join(self._settings.time_limit_s)

    def _settle(self, time_limit_s: float) -> None:
        """Agree on how the checkpoint ended."""
        writing, self._writing = self._writing, None
        if writing.ident is not None:
            writing.join(time_limit_s)
        ends = everyone((writing.is_alive(), writing.failure), dist.get_world_size())
        told = next((failure for _, failure in ends if failure is not None), None)
        if told is None and any(alive for alive, _ in ends):
            limit = self._settings.time_limit_s
            name = writing.content.folder.name
            told = f"checkpoint {name} is not written after checkpoint.time_limit_s={limit:g} s; {UNTOUCHED}"
        if told is not None:
            self._saved = None
            raise RunError(told, on_every_rank=True)
