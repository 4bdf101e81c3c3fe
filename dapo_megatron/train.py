"""The loop: submit → collect → score → advantages → update → reshard → log."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from dapo_megatron.agreement import done_on_rank_zero
from dapo_megatron.assemble import Run, append_samples
from dapo_megatron.critic_step import critic_step, estimate
from dapo_megatron.data.completions import PromptGroup
from dapo_megatron.debug_batches import load_batches, save_batch
from dapo_megatron.device_memory import held_on_card
from dapo_megatron.errors import Interrupted, RunError
from dapo_megatron.evaluation import evaluate
from dapo_megatron.learner.critic import copy_decoder
from dapo_megatron.learner.optimizer import scheduled_rate
from dapo_megatron.mismatch import check_gap
from dapo_megatron.monitoring.journal import Journal
from dapo_megatron.monitoring.step_metrics import Clock, generated_per_trained, learner_metrics, rollout_metrics
from dapo_megatron.policy_step import PolicyStep, learn_step, score_old_policy
from dapo_megatron.prepare import encode_examples
from dapo_megatron.reference_policy import keep_reference, move_reference
from dapo_megatron.rollout.dynamic_sampling import SampledStep, sample_step
from dapo_megatron.skipped_updates import check_guards, guard_metrics
from dapo_megatron.stop import StopSignal
from dapo_megatron.supervised import run_stage


def train(run: Run, journal: Journal, stop: StopSignal, *, rollout_only: bool = False) -> None:
    """Train until run.steps or a stop signal; every rank calls it. A checkpoint is left in both cases.

    Any signal ends the wait for engines that start, SIGTERM and SIGINT that for their rollouts too: the step is then
    drawn again after --resume. After `Interrupted` all ranks find `stop` requested.
    """
    steps, checkpoint = run.recipe.run.steps, run.recipe.checkpoint
    warm_start(run, journal, stop)
    if not stop.requested() or (run.step and run.recipe.algorithm.reference.moves):
        begin_learning(run)  # also before stopping at once, for the next checkpoint holds a reference that moves
    run.begins("reshard")
    if not stop.requested():
        with suppress(Interrupted), heeding(run, stop.came), checkpoint_on_failure(run):
            run.sync.push(run.updates)
    if run.step == 0 and not stop.requested():
        metrics = {"step": 0}
        metrics |= validate(run, "before", partial(journal.step, metrics))
        journal.step(metrics)
        improved(run, metrics)
        if checkpoint.every and run.updates and run.step < steps and not rollout_only:
            save(run)  # the warm start is not to be lost
    while run.step < steps and not stop.requested():
        with suppress(Interrupted), run.profiler.step(run.step + 1):
            train_step(run, journal, stop, rollout_only=rollout_only)
    save(run)
    run.saver.wait()


def train_step(run: Run, journal: Journal, stop: StopSignal, *, rollout_only: bool = False) -> None:
    """One rollout step with all that follows it: validation, metrics, alarms, a checkpoint."""
    steps, checkpoint, evaluation = run.recipe.run.steps, run.recipe.checkpoint, run.recipe.evaluation
    run.saver.check()
    if run.grader is not None:
        run.grader.begin_step()
    clock = Clock(run.phases.mark)
    with clock.phase("rollout"), checkpoint_on_failure(run):
        with heeding(run, stop.presses):
            sampled = roll_out(run)
        if not rollout_only:
            run.sync.give_way()
    metrics = {"step": run.step + 1, "learning_rate": learning_rate(run), **rollout_metrics(sampled)}
    if rollout_only:
        save_batch(run, sampled.trained)
    else:
        metrics |= held_on_card(run.learner.device, "learn")
        run.begins("learn")
        with clock.phase("learn"), run.optimizer_memory.on_device():
            metrics |= learner_metrics(learn(run, sampled.trained, sampled.kept))
            metrics |= move_reference(run)
        metrics |= generated_per_trained(metrics) | guard_metrics(run, journal)
        run.surplus, run.acceptance = sampled.kept, sampled.acceptance
    run.step += 1
    if not rollout_only:
        run.begins("reshard")
        told = partial(journal.step, metrics)
        with clock.phase("reshard"), checkpoint_on_failure(run, told), _resharding(run):
            transfer = run.sync.push(run.updates)
        metrics["resharding/bytes_sent"] = float(transfer.bytes_sent if transfer else 0)
        metrics |= held_on_card(run.learner.device, "rollout")
    metrics |= clock.metrics() | (run.grader.metrics() if run.grader else {"grader/failures": 0.0})
    if evaluation.every and (run.step % evaluation.every == 0 or run.step == steps):
        metrics |= validate(run, "after" if run.step == steps else "during", partial(journal.step, metrics))
    metrics |= run.stragglers.report(run.step)
    journal.step(metrics)
    check_guards(run)
    check_gap(run.recipe, metrics.get("mismatch/logprob_abs_mean", 0.0), run.step)
    best = improved(run, metrics) and checkpoint.keep_best
    if checkpoint.every and (best or run.step % checkpoint.every == 0) and run.step < steps:
        save(run)


def heeding(run: Run, stopping: Callable[[], bool]) -> AbstractContextManager:
    """Inside, waits for engines that are servers end once `stopping` says so."""
    return nullcontext() if run.engines is None else run.engines.heeding(stopping)


def _resharding(run: Run) -> AbstractContextManager:
    """Engines that are servers are steered by rank 0 while the others wait: its time is no rank's own."""
    return run.phases.own("reshard") if run.engines is None else run.phases.mark("reshard")


def train_from_files(run: Run, journal: Journal, stop: StopSignal, files: Sequence[Path]) -> None:
    """Learn from batches that `--debug-rollout-only` saved; no engine is asked for anything."""
    begin_learning(run)
    for groups in load_batches(files, shape=run.recipe.rollout.shape):
        if stop.requested():
            break
        with run.profiler.step(run.step + 1):
            _learn_from(run, journal, groups)
    save(run)
    run.saver.wait()


def _learn_from(run: Run, journal: Journal, groups: Sequence[PromptGroup]) -> None:
    clock = Clock(run.phases.mark)
    metrics = {"step": run.step + 1, "learning_rate": learning_rate(run)}
    run.begins("learn")
    with clock.phase("learn"), run.optimizer_memory.on_device():
        metrics |= learner_metrics(learn(run, groups))
        metrics |= move_reference(run)
    metrics |= guard_metrics(run, journal) | rollout_metrics(SampledStep(groups, groups, 1))
    run.step += 1
    journal.step(metrics | clock.metrics() | run.stragglers.report(run.step))
    check_guards(run)


def warm_start(run: Run, journal: Journal, stop: StopSignal) -> None:
    """The supervised stages that are not done yet."""
    stages = run.recipe.supervised.stages
    total = sum(stage.steps for stage in stages)
    if sum(run.supervised_done) < total and not stop.requested():
        with suppress(Interrupted), heeding(run, stop.came):
            run.sync.give_way()
    for i, stage in enumerate(stages):
        if run.supervised_done[i] >= stage.steps or stop.requested():
            continue
        before = sum(run.supervised_done[:i])
        if not run.supervised_done[i]:
            run.guards["supervised"].begin_anew()  # other data has other losses

        def report(metrics: dict[str, float], i: int = i, before: int = before) -> bool:
            run.supervised_done[i] += 1
            run.updates += not metrics["guard/skipped"]
            run.begins("supervised")
            journal.supervised(before + run.supervised_done[i], total, metrics)
            if metrics["guard/skipped"]:
                run.guards["supervised"].skipped[-1]["supervised_step"] = before + run.supervised_done[i]
                guard_metrics(run, journal)
                check_guards(run)
            return stop.requested()

        with run.optimizer_memory.on_device():
            run_stage(
                run.learner,
                stage,
                encode_examples(run.tokenizer, run.recipe, stage),
                seed=run.recipe.run.seed,
                done=run.supervised_done[i],
                guard=run.guards["supervised"],
                report=report,
            )


def begin_learning(run: Run) -> None:
    """Between warm start and rollouts: the reference is kept, a critic without a folder of its own begins as the
    policy."""
    run.guards["supervised"].begin_anew()  # done with: it must not end the steps that follow
    run.reference = keep_reference(run)
    if run.critic is not None and run.step == 0 and run.recipe.critic.path is None:
        copy_decoder(run.learner, run.critic, run.recipe.resharding)


def roll_out(run: Run) -> SampledStep:
    """Sample until the step has its mixed groups (DAPO's dynamic sampling)."""

    def draw(count: int, wave: int) -> list[PromptGroup]:
        run.begins("rollout")
        return run.training.draw_for_training(run.prompt_order.take(count), run.step, wave)

    return sample_step(
        draw,
        run.recipe.algorithm.dynamic_sampling,
        wanted=run.recipe.rollout.prompts_per_step,
        step=run.step,
        surplus=run.surplus,
        acceptance=run.acceptance,
    )


def learn(run: Run, groups: Sequence[PromptGroup], kept: Sequence[PromptGroup] = ()) -> PolicyStep | None:
    """Old log-probs of all groups, of those `kept` for later too, the reference's, a critic's values; then the step's
    gradient updates, the critic's last; None when there is nothing to learn from."""
    recipe, critic = run.recipe, run.critic
    score_old_policy(run.learner, groups, recipe.algorithm, kept=kept, reference=run.reference)
    if not groups:
        return None
    estimates = None if critic is None else estimate(critic, groups, recipe)
    result = learn_step(
        run.learner,
        groups,
        recipe,
        learning_rate=learning_rate(run),
        step=run.step,
        estimates=None if estimates is None else estimates.advantages,
        waits=run.step < recipe.critic.warmup_steps,
        entropy_coefficient=run.entropy_coefficient,
        guard=run.guards["policy"],
    )
    if result.entropy_bonus is not None:
        run.entropy_coefficient = result.entropy_bonus.following
    if critic is not None:
        own = critic_step(critic, estimates, recipe, step=run.step, guard=run.guards["critic"])
        result = replace(result, critic=own)
        run.critic_updates += result.critic.updates
    run.updates += result.updates
    return result


def learning_rate(run: Run) -> float:
    """The optimizer's learning rate of the present rollout step."""
    settings = run.recipe.optimizer
    return scheduled_rate(
        run.step,
        run.recipe.run.steps,
        peak=settings.learning_rate,
        least=settings.min_learning_rate,
        warmup=settings.warmup_rollout_steps,
        schedule=settings.schedule,
    )


def validate(run: Run, when: str, tell: Callable[[], None]) -> dict[str, float]:
    """Validation metrics; a few completions are kept for the report. `tell`: as in `checkpoint_on_failure`.

    Rank 0, which has the grader, tells how many responses got no verdict.
    """
    if run.validation is None or not run.recipe.evaluation.every:
        return {}
    run.begins("validation")
    failures = 0 if run.grader is None else run.grader.failures
    clock = Clock(run.phases.mark)
    with clock.phase("validation"), checkpoint_on_failure(run, tell):
        metrics, groups = evaluate(run.validation, run.recipe)
    append_samples(run, groups, when)
    if run.grader is not None:
        metrics["validation/grader_failures"] = float(run.grader.failures - failures)
    return metrics | {"time/validation": clock.metrics()["time/validation"]}


@contextmanager
def checkpoint_on_failure(run: Run, tell: Callable[[], None] | None = None) -> Iterator[None]:
    """Around work of the engines: what all ranks fail at alike leaves a checkpoint of the last update.

    Prompts taken in vain come again after --resume. `tell`: called then, for what is known of the step. After
    `Interrupted` the checkpoint is left to the end of `train`.
    """
    order = None if run.prompt_order is None else run.prompt_order.state()
    try:
        yield
    except RunError as error:
        if not error.on_every_rank:
            raise
        if order is not None:
            run.prompt_order.load_state(order)
        if isinstance(error, Interrupted):
            raise
        told = f"{error}\nthe state after step {run.step} is saved; continue with --resume"
        try:
            save(run)
            run.saver.wait()
        except RunError as second:
            told = f"{error}\n{second}"
        if tell is not None:
            tell()
        raise RunError(told, on_every_rank=True) from None


def improved(run: Run, metrics: Mapping[str, float]) -> bool:
    """Whether this step's validation is better than all before; remembered if so."""
    accuracy = metrics.get("validation/accuracy")
    if accuracy is None or (run.best is not None and accuracy <= run.best["accuracy"]):
        return False
    run.best = {"step": run.step, "accuracy": accuracy}
    return True


def save(run: Run) -> None:
    """Begin a checkpoint of where the run stands, and write what a judge was asked; collective.

    Raises:
        RunError: as `CheckpointSaver.save`; the judge's file could not be written, and then the checkpoint is.
    """
    run.begins("checkpoint")
    with run.phases.own("checkpoint"):
        run.saver.save(run.state(), run.surplus, run.reference)
    try:
        done_on_rank_zero(None if run.grader is None else run.grader.write_records, run.world.size)
    except RunError as error:
        run.saver.wait()
        told = f"{error}\nthe state after step {run.step} is saved; continue with --resume"
        raise RunError(told, on_every_rank=True) from None
