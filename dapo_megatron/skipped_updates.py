"""What a run does about updates that its guards skipped: a file, two metrics, and in the end a stop."""

from pathlib import Path

from dapo_megatron.assemble import Run
from dapo_megatron.errors import RunError
from dapo_megatron.learner.manifest import list_checkpoints
from dapo_megatron.monitoring.journal import Journal

CAUSES = (
    "likely causes: optimizer.learning_rate too high or optimizer.warmup_rollout_steps too short, a reward or an own "
    "loss that is not finite, responses far from the policy that trains on them (mismatch/ and ratio/ metrics), or a "
    "GPU that computes wrongly, if one rank alone is behind it"
)


def guard_metrics(run: Run, journal: Journal) -> dict[str, float]:
    """Updates skipped in this step, and in the run so far; their records go to a file."""
    taken = [record for guard in run.guards.values() for record in guard.take()]
    journal.skipped(taken)
    total = sum(guard.total for guard in run.guards.values())
    return {"guard/skipped": float(len(taken)), "guard/skipped_total": float(total)}


def check_guards(run: Run) -> None:
    """End a run that skips update after update.

    Raises:
        RunError: a guard is exhausted, on every rank alike; names the checkpoint to go back to.
    """
    for guard in run.guards.values():
        if guard.exhausted:
            run.saver.wait()  # the checkpoint under way may be the one to name
            settings = guard.settings
            raise RunError(
                f"{settings.most_skips} of the last {settings.among} {guard.part} updates were skipped "
                f"(optimizer.guard), the first of them in step {guard.first_of_latest}; weights and optimizer are as "
                f"the last update before them left them\n{CAUSES}\n{_way_back(run, guard.first_of_latest)}",
                on_every_rank=True,
                lasting=True,
            )


def _way_back(run: Run, first_skip: int) -> str:
    """The newest checkpoint from before the first of these skips; `RUN/skipped_updates.jsonl` says more."""
    records = run.paths.run / "skipped_updates.jsonl"
    before = [folder for folder in list_checkpoints(run.paths.run / "checkpoints") if _step(folder) < first_skip]
    if not before:
        return f"no checkpoint is from before them: change a setting and start anew with --overwrite; see {records}"
    newest = list_checkpoints(run.paths.run / "checkpoints")[-1]
    way = f"the newest checkpoint from before them is {before[-1]}: change a setting and go on with --resume"
    if newest != before[-1]:
        way += f", after moving the later ones, up to {newest.name}, out of {newest.parent}"
    return f"{way}; see {records}"


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
