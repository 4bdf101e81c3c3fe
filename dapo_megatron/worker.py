"""One rank of a run, from joining the world to leaving it."""

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import DistError

from dapo_megatron.agreement import checked_on_rank_zero, from_rank_zero
from dapo_megatron.assemble import Run, assemble, group_settings
from dapo_megatron.config import Recipe
from dapo_megatron.config.reward import Reward
from dapo_megatron.data.completions import PromptGroup
from dapo_megatron.errors import RequestError, RunError, tell_final
from dapo_megatron.launch import World
from dapo_megatron.learner.checkpoint import load_checkpoint
from dapo_megatron.learner.checkpoint_files import load_surplus, random_states_file
from dapo_megatron.learner.distributed import choose_device, join_world, leave_world
from dapo_megatron.learner.manifest import newest_checkpoint, read_state, set_aside_later, tidy_up
from dapo_megatron.learner.random_states import read_random_states, restore_random_states
from dapo_megatron.monitoring import write_report
from dapo_megatron.monitoring.journal import Journal
from dapo_megatron.monitoring.metrics import read_metrics
from dapo_megatron.prepare import check_request
from dapo_megatron.run_directory import claim_run_directory, lay_out_run
from dapo_megatron.stop import StopSignal
from dapo_megatron.train import train, train_from_files
from dapo_megatron.watchdog import Watchdog
from dapo_megatron.weight_sync import export_hugging_face

RESHARDING_SLACK_S = 300.0  # rank 0 settles with the engines after a transfer
SAVING_SLACK_S = 300.0  # ranks come to the end of a save one after the other
JUDGING_SLACK_S = 300.0  # the rule's pool comes before the judge
STALLED = 4.0  # a phase may hold several of the longest waits
SHOWN_CHARACTERS = 300  # of a sample completion on the console
GONE = r"(?i)connection (was )?(closed|reset|refused)|broken pipe|timed out|timeout|remote process exited"
STORE_GONE = r"(?i)timed out waiting|socket timeout"


@dataclass(frozen=True)
class Mode:
    """How `train` was asked to run. `prepared`: the launcher has checked the request and laid out the directory."""

    resume: bool = False
    overwrite: bool = False
    prepared: bool = False
    rollout_only: bool = False
    train_only: tuple[Path, ...] = ()


def run_rank(recipe: Recipe, world: World, mode: Mode) -> int:
    """Train as one rank of `world`; returns the exit code: 0 done, 128 + signal when stopped by one.

    Raises:
        RequestError, RunError: as its parts do, on every rank of the world for a wrong request.
    """
    device = choose_device(recipe.learner.device, world.local_rank)
    # ranks also wait for each other's rollouts
    limit = max(
        recipe.learner.time_limit_s,
        recipe.rollout.time_limit_s + recipe.rollout.start_limit_s,
        2 * recipe.resharding.time_limit_s + RESHARDING_SLACK_S,
        recipe.checkpoint.time_limit_s + SAVING_SLACK_S,
        judging_limit(recipe.reward),
    )
    join_world(world, device=device, time_limit_s=limit)
    try:
        if not mode.prepared:
            _prepare_on_rank_zero(recipe, world, mode)
        run = assemble(recipe, world, rollouts=not mode.train_only)
        run.watchdog = Watchdog(recipe.run.stall_limit_s or STALLED * limit, world.rank)
        try:
            with run.phases.counting_waits() if run.stragglers.active else nullcontext():
                return _train(run, mode)
        except RuntimeError as error:
            if not lost_rank(error):
                raise
            told = " ".join(str(error).split())[:SHOWN_CHARACTERS]
            raise RunError(
                f"rank {world.rank}, at step {run.step}: another rank has gone or does not answer ({told}); what that "
                "rank told last says why; continue with --resume"
            ) from error
        finally:
            run.watchdog.close()
            run.close()
    finally:
        leave_world()


def lost_rank(error: RuntimeError) -> bool:
    """Whether a collective failed for want of another rank. gloo has no error of its own; NCCL's may also be this
    rank's, as for want of memory."""
    told = str(error)
    between_ranks = isinstance(error, DistError) or "gloo" in told
    return re.search(GONE if between_ranks else STORE_GONE, told) is not None


def judging_limit(reward: Reward) -> float:
    """The longest time (seconds) for which ranks wait while rank 0 starts or asks a judge."""
    if reward.method != "judge":
        return 0.0
    return max(reward.judge.limit_s, reward.judge.vllm.start_limit_s) + JUDGING_SLACK_S


def _train(run: Run, mode: Mode) -> int:
    stop = StopSignal(run.device)
    lines = run.data_lines + (_resume(run) if mode.resume else [])
    journal = Journal(run.recipe, rank=run.world.rank, step=run.step, supervised_step=sum(run.supervised_done))
    try:
        for line in lines:
            journal.note(line)
        if mode.train_only:
            train_from_files(run, journal, stop, mode.train_only)
        else:
            train(run, journal, stop, rollout_only=mode.rollout_only)
        if stop.requested():
            stages = run.recipe.supervised.stages
            warming = run.step == 0 and sum(run.supervised_done) < sum(stage.steps for stage in stages)
            where = f"supervised step {sum(run.supervised_done)}" if warming else f"step {run.step}"
            told = f"stopped at {where}; continue with --resume"
            journal.note(told)
            tell_final(told)
            return stop.exit_code
        run.begins("the end")
        if run.recipe.checkpoint.hugging_face and not mode.rollout_only:
            limit = run.recipe.resharding.time_limit_s
            export_hugging_face(run.learner, run.paths.run / "hf", side_files=run.paths.model, time_limit_s=limit)
            if run.critic is not None:
                folder, side_files = run.paths.run / "critic", Path(run.recipe.critic.path or run.paths.model)
                export_hugging_face(run.critic, folder, side_files=side_files, time_limit_s=limit)
        _conclude(run, journal)
    finally:
        journal.close()
    return 0


def _prepare_on_rank_zero(recipe: Recipe, world: World, mode: Mode) -> None:
    """Check and lay out once for the whole world."""

    def prepare() -> None:
        check_request(recipe, world.size)
        claim_run_directory(recipe, resume=mode.resume, overwrite=mode.overwrite, needed=mode.train_only)
        lay_out_run(recipe, overwrite=mode.overwrite)

    checked_on_rank_zero(prepare, world.rank, world.size)


def _resume(run: Run) -> list[str]:
    """Load the newest sound checkpoint, chosen by rank 0; returns what there is to say about it."""
    folder, lines = from_rank_zero(_choose(run) if run.world.rank == 0 else None, run.world.size)
    if folder is None and lines:
        raise RequestError("\n".join([*lines, "no sound checkpoint is left; start anew with --overwrite"]))
    if folder is None:
        return [*lines, "no checkpoint to resume from; starting at step 0"]
    for part, learner in run.learners().items():
        load_checkpoint(folder, learner, part)
    state = read_state(folder)
    run.load_state(state)
    run.resumed = folder
    run.surplus, dropped = still_fitting(load_surplus(folder), state, run.recipe)
    lines = [*lines, *dropped]
    if state.get("layout") == run.ranks():
        trackers = {part: learner.groups for part, learner in run.learners().items()}
        restore_random_states(read_random_states(random_states_file(folder, run.world.rank)), run.device, trackers)
        run.saver.holds(run.state())
    else:
        lines = [*lines, "the checkpoint is of another layout: metrics will agree to rounding, not to the bit"]
    return [*lines, f"resumed from {folder}"]


def still_fitting(groups: Sequence[PromptGroup], state: dict, recipe: Recipe) -> tuple[list[PromptGroup], list[str]]:
    """The kept groups of a checkpoint with this state.json, none if they were made under other settings than the
    recipe's; and a line that says which."""
    noted, wanted = state.get("groups", {}), group_settings(recipe)
    changed = [
        f"{name}={now} ({noted.get(name, 'unknown')} before)"
        for name, now in (dict.fromkeys(noted, "not set") | wanted).items()
        if noted.get(name) != now
    ]
    if not groups or not changed:
        return list(groups), []
    return [], [f"{len(groups)} groups kept for the next step are dropped, they do not fit {', '.join(changed)}"]


def _choose(run: Run) -> tuple[Path | None, list[str]]:
    """Rank 0: the checkpoint to resume from; damaged ones that it replaces are set aside."""
    tidy_up(run.paths.run)
    folder, lines = newest_checkpoint(run.paths.run)
    if folder is not None:
        set_aside_later(folder)
    return folder, lines


def _conclude(run: Run, journal: Journal) -> None:
    """Rank 0: the report, and sample completions from before and after."""
    if run.world.rank != 0 or not run.recipe.monitoring.report:
        return
    png, html = write_report([run.paths.run])
    samples = run.paths.run / "samples.jsonl"
    for sample in read_metrics(samples) if samples.exists() else []:
        if sample["when"] != "during":
            verdict = "right" if sample["right"] else "wrong"
            response = " ".join(sample["response"].split())
            shown = response if len(response) <= SHOWN_CHARACTERS else response[:SHOWN_CHARACTERS] + " …"
            journal.note(f"{sample['when']:>6}: {sample['prompt']} → {shown}   ({verdict})")
    journal.note(f"picture: {png}\nreport:  {html}")
