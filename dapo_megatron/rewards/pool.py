"""Grading in worker processes, each item under a hard time limit.

A grader that hangs, crashes or raises on one item must neither stop the run nor cost its neighbours their reward: the
item counts as wrong and is counted in `failures`.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType, TracebackType

import numpy as np
from pebble import ProcessExpired, ProcessPool

from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.rewards.rule import grade as rule_grade

GradeFunction = Callable[[str, str], bool]

CHUNK_ITEMS = 64
CHUNK_CHARACTERS = 1_000_000
START_LIMIT_S = 120.0
# What ending a stuck worker and starting the next one may take, beyond the item's own limit.
RESTART_LIMIT_S = 15.0
CLOSE_LIMIT_S = 30.0
REBUILDS = 3

_WRONG, _RIGHT, _RAISED = range(3)


class GraderPool:
    """Worker processes that grade (response, answer) pairs; a context manager that leaves no process behind.

    Args:
        workers: processes, at least 1.
        time_limit_s: seconds of wall time one item may take.
        grade_function: (response, answer) → bool, importable by name.

    Counters, over the life of the pool: `timed_out` items that exceeded the limit, `crashed` items that raised or
    ended their worker, `failures` = both.

    Raises:
        RequestError: workers or time_limit_s out of range.
        RunError: the workers cannot start, for example because `grade_function` cannot be imported in them.
    """

    def __init__(self, workers: int, time_limit_s: float, grade_function: GradeFunction = rule_grade) -> None:
        if workers < 1:
            raise RequestError(f"reward.workers={workers} must be positive; use at least 1")
        if not time_limit_s > 0:
            raise RequestError(f"reward.time_limit_s={time_limit_s} must be positive; use for example 2.0")
        self.workers = workers
        self.time_limit_s = time_limit_s
        self.timed_out = 0
        self.crashed = 0
        self._closed = False
        self._replacing = threading.Lock()  # closing and rebuilding exclude each other
        self._grade_function = grade_function
        self._pool = self._started_pool()

    @property
    def failures(self) -> int:
        """Items without a verdict, counted as wrong."""
        return self.timed_out + self.crashed

    def grade(self, responses: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """Verdicts of B responses against their references: bool [B]; an item without a verdict is False.

        Items travel in chunks that share one time limit. A chunk that exceeds it or loses its worker is graded again
        item by item, so only the guilty item fails.

        Raises:
            RunError: the workers keep dying between items, or do not answer at all.
        """
        if len(responses) != len(answers):
            raise ValueError(f"{len(responses)} responses but {len(answers)} answers")
        right_B = np.zeros(len(responses), dtype=bool)
        jobs, rebuilds = _chunks(responses, self.workers), 0
        while jobs:
            jobs, broken = self._run(jobs, responses, answers, right_B)
            if broken:
                if rebuilds == REBUILDS:
                    raise RunError(
                        f"reward workers died {REBUILDS + 1} times between items; is the machine out of memory?"
                    )
                rebuilds += 1
                with self._replacing:
                    if self._closed:  # by another thread
                        raise RunError("the grader pool was closed while it was grading")
                    _stop(self._pool)
                    self._pool = self._started_pool()
        return right_B

    def close(self) -> None:
        """End every worker, whatever it is doing. A second call does nothing.

        Raises:
            RunError: a worker did not end in time.
        """
        self._closed = True
        with self._replacing:
            _stop(self._pool)

    def __enter__(self) -> "GraderPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(
        self, jobs: list[list[int]], responses: Sequence[str], answers: Sequence[str], right_B: np.ndarray
    ) -> tuple[list[list[int]], bool]:
        """Grade the items of every job into `right_B`; return the jobs to run again, and whether the pool broke."""
        running: list[tuple[list[int], Future]] = []
        again: list[list[int]] = []
        broken = False
        for job in jobs:
            pairs = [(responses[i], answers[i]) for i in job]
            arguments = (self._grade_function, pairs, self.time_limit_s)
            try:
                running.append((job, self._pool.schedule(_grade_chunk, args=arguments, timeout=self.time_limit_s)))
            except RuntimeError:  # pebble's word for a pool that broke or was closed
                broken = True
                again.append(job)
        turns = -(-len(running) // self.workers)
        limit_s = START_LIMIT_S + turns * (self.time_limit_s + RESTART_LIMIT_S)
        if wait([future for _, future in running], timeout=limit_s).not_done:
            raise RunError(f"reward workers did not answer within {limit_s:.0f} s")
        for job, future in running:
            error = future.exception()
            if error is None:
                verdicts = np.array(future.result())
                right_B[job] = verdicts == _RIGHT
                self.crashed += int((verdicts == _RAISED).sum())
            elif isinstance(error, BrokenProcessPool):
                broken = True
                again.append(job)
            elif not isinstance(error, TimeoutError | ProcessExpired):
                raise RunError(f"reward workers failed: {error!r}") from error
            elif len(job) > 1:
                again.extend([i] for i in job)
            elif isinstance(error, TimeoutError):
                self.timed_out += 1
            else:
                self.crashed += 1
        return again, broken

    def _started_pool(self) -> ProcessPool:
        context = SpawnContext() if self._grade_function.__module__ == "__main__" else _BareSpawnContext()
        pool = ProcessPool(max_workers=self.workers, initializer=_prepare_worker, context=context)
        try:
            probes = [pool.schedule(_import_only, args=(self._grade_function,)) for _ in range(self.workers)]
            if wait(probes, timeout=START_LIMIT_S).not_done:
                raise RunError(f"reward workers did not start within {START_LIMIT_S:.0f} s")
            errors = [error for error in (probe.exception() for probe in probes) if error is not None]
            if errors:
                name = getattr(self._grade_function, "__qualname__", repr(self._grade_function))
                raise RunError(f"reward workers did not start with the grader {name}: {errors[0]!r}") from errors[0]
        except BaseException:
            _stop(pool)
            raise
        return pool


def _chunks(responses: Sequence[str], workers: int) -> list[list[int]]:
    """Item numbers in jobs of at most CHUNK_ITEMS items and, where one item allows it, CHUNK_CHARACTERS characters."""
    most = min(CHUNK_ITEMS, max(1, -(-len(responses) // workers)))
    chunks: list[list[int]] = []
    characters = 0
    for i, response in enumerate(responses):
        characters += len(response)
        if not chunks or len(chunks[-1]) == most or characters > CHUNK_CHARACTERS:
            chunks.append([])
            characters = len(response)
        chunks[-1].append(i)
    return chunks


def _stop(pool: ProcessPool) -> None:
    pool.stop()
    # pebble's join has no time limit of its own once the pool is stopped
    joiner = threading.Thread(target=pool.join, daemon=True)
    joiner.start()
    joiner.join(CLOSE_LIMIT_S)
    if joiner.is_alive():
        raise RunError(f"reward workers did not end within {CLOSE_LIMIT_S:.0f} s")


def _prepare_worker() -> None:
    # a grader stuck inside C code never reaches a Python handler; the default action ends the process at once
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _import_only(grade_function: GradeFunction) -> None:
    """Reaching this body proves that the worker runs and has found the grade function."""


def _grade_chunk(grade_function: GradeFunction, pairs: list[tuple[str, str]], time_limit_s: float) -> list[int]:
    # should the parent be killed, nobody enforces its limit: the kernel then ends this worker
    signal.setitimer(signal.ITIMER_REAL, time_limit_s + RESTART_LIMIT_S)
    try:
        return [_verdict(grade_function, response, answer) for response, answer in pairs]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _verdict(grade_function: GradeFunction, response: str, answer: str) -> int:
    try:
        return _RIGHT if grade_function(response, answer) else _WRONG
    except Exception:  # whatever a grader raises costs its own item only
        return _RAISED


class _BareSpawnProcess(SpawnProcess):
    """A spawned process that does not run the parent's main script again, and so does not import what that imports."""

    def start(self) -> None:
        with _main_module_hidden():
            super().start()


class _BareSpawnContext(SpawnContext):
    Process = _BareSpawnProcess


@contextmanager
def _main_module_hidden() -> Iterator[None]:
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
