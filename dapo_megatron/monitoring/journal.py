"""One place to tell what happens: console, trackers and alerts on rank 0, silence elsewhere."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dapo_megatron.config import Recipe
from dapo_megatron.files import write_text_atomically
from dapo_megatron.monitoring.alerts import AlertBook
from dapo_megatron.monitoring.console import Console
from dapo_megatron.monitoring.entropy_change import entropy_change
from dapo_megatron.monitoring.metrics import MetricsFile, read_metrics, truncate_after
from dapo_megatron.monitoring.trackers import open_trackers


class Journal:
    """Opened with the step the run stands at: lines of later steps, left by a run that was killed, are cut off."""

    def __init__(self, recipe: Recipe, *, rank: int, step: int, supervised_step: int) -> None:
        self.speaks = rank == 0
        if not self.speaks:
            return
        run, monitoring = Path(recipe.run.directory), recipe.monitoring
        # at step 0 the first validation is still to come, also when resuming there
        kept = step if step else -1
        truncate_after(run / "metrics.jsonl", kept)
        truncate_after(run / "supervised.jsonl", supervised_step, key="supervised_step")
        _continue_samples(run / "samples.jsonl", kept)
        self._skipped = run / "skipped_updates.jsonl"
        truncate_after(self._skipped, step)
        truncate_after(self._skipped, supervised_step, key="supervised_step")
        self.console = Console(recipe.run.steps)
        self.trackers = open_trackers(
            run,
            tensorboard=monitoring.tensorboard,
            wandb=monitoring.wandb,
            mlflow=monitoring.mlflow,
            project=monitoring.project,
            name=recipe.run.name,
            config=recipe.model_dump(),
            warn=self.console.alert,
        )
        history = read_metrics(run / "metrics.jsonl") if (run / "metrics.jsonl").exists() else []
        self.alerts = AlertBook(recipe.resharding.max_logprob_gap, history)

    def step(self, metrics: Mapping[str, float]) -> None:
        """A rollout step (or the validation before the first, step 0); what earlier steps foretold of it is added."""
        if not self.speaks:
            return
        metrics = {**metrics, **entropy_change(self.alerts.history, metrics)}
        for tracker in self.trackers:
            tracker.log(metrics, int(metrics["step"]))
        self.console.step(metrics)
        for text in self.alerts.update(metrics):
            self.console.alert(text)

    def supervised(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """A step of the supervised stages, counted from 1 over all of them."""
        if not self.speaks:
            return
        for tracker in self.trackers:
            tracker.log({"supervised_step": step, **metrics}, step)
        self.console.supervised(step, total, metrics["loss/supervised"], metrics["time/step"])

    def skipped(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Updates that were not made: a line each, in a file of their own and on the console."""
        if not self.speaks or not records:
            return
        file = MetricsFile(self._skipped)
        for record in records:
            file.append(record)
            self.console.note(f"step {record['step']}: a {record['part']} update is skipped: {record['reason']}")

    def note(self, text: str) -> None:
        """A plain line."""
        if self.speaks:
            self.console.note(text)

    def close(self) -> None:
        """Flush and close everything."""
        if self.speaks:
            for tracker in self.trackers:
                tracker.close()
            self.console.close()


def _continue_samples(path: Path, kept: int) -> None:
    """Cut off the samples of later steps; what was "after" an earlier end is "during" the run that goes on."""
    truncate_after(path, kept)
    if path.exists():
        samples = [{**s, "when": "during" if s["when"] == "after" else s["when"]} for s in read_metrics(path)]
        write_text_atomically(path, "".join(json.dumps(s) + "\n" for s in samples))
