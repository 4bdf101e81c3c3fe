"""Grading in worker processes, each item under hard limits of time and memory.

A grader that hangs, crashes, raises or takes all memory on one item must neither stop the run nor cost its neighbours
their reward: the item counts as wrong and is counted in `failures`.
"""

import pickle
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.context import SpawnContext, SpawnProcess
from types import ModuleType, TracebackType
from typing import NamedTuple

import numpy as np
import psutil
from pebble import ProcessExpired, ProcessPool

from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.rewards.grading import grade as rule_grade


class Score(NamedTuple):
    """What a grader may return instead of a plain verdict."""

    right: bool
    reward: float


GradeFunction = Callable[..., bool | Score]

LEAST_MEMORY_MIB = 64
CHUNK_ITEMS = 64
CHUNK_CHARACTERS = 1_000_000
START_LIMIT_S = 120.0
# What ending a stuck worker and starting the next one may take, beyond the item's own limit.
RESTART_LIMIT_S = 15.0
CLOSE_LIMIT_S = 30.0
REBUILDS = 3

_WRONG, _RIGHT, _RAISED, _NO_MEMORY = range(4)


class RewardContractError(Exception):
    """A grader that broke its contract on any item (a wrong shape, a NaN): the run ends, as no item is to blame."""


@dataclass(frozen=True)
class Scores:
    """Of B items: right_B bool; rewards_B float64, NaN for items without a score and for graders of plain verdicts."""

    right_B: np.ndarray
    rewards_B: np.ndarray


class GraderPool:
    """Worker processes that grade items such as (response, answer); a context manager that leaves no process behind.

    Args:
        workers: processes, at least 1.
        time_limit_s: seconds of wall time one item may take.
        grade_function: (response, answer, …) → bool or `Score`; a function importable by name, or an object that
            pickles. If it has `prepare()`, each worker calls that before its first item; if it has `score_many(items)`,
            that gets several items at once and returns one result each.
        memory_limit_mib: address space an item may take beyond what the ready worker has, at least 64; None = no limit.
        chunk_items: most items that travel together.

    Counters, over the life of the pool: `timed_out` items that exceeded the time limit, `crashed` items that raised or
    ended their worker, `out_of_memory` items that exceeded the memory limit, `failures` = all three.

    Raises:
        RequestError: workers or a limit out of range.
        RunError: the workers cannot start, for example because `grade_function` cannot be imported in them.
    """

    def __init__(
        self,
        workers: int,
        time_limit_s: float,
        grade_function: GradeFunction = rule_grade,
        *,
        memory_limit_mib: int | None = None,
        chunk_items: int = CHUNK_ITEMS,
    ) -> None:
        if workers < 1:
            raise RequestError(f"reward.workers={workers} must be positive; use at least 1")
        if not time_limit_s > 0:
            raise RequestError(f"reward.time_limit_s={time_limit_s} must be positive; use for example 2.0")
        if memory_limit_mib is not None and memory_limit_mib < LEAST_MEMORY_MIB:
            raise RequestError(
                f"reward.memory_limit_mib={memory_limit_mib} is too little; use at least {LEAST_MEMORY_MIB}"
            )
        self.workers = workers
        self.time_limit_s = time_limit_s
        self.memory_limit_mib = memory_limit_mib
        self.chunk_items = chunk_items
        self.timed_out = 0
        self.crashed = 0
        self.out_of_memory = 0
        self._closed = False
        self._replacing = threading.Lock()  # closing and rebuilding exclude each other
        self._grade_function = grade_function
        self._pool = self._started_pool()

    @property
    def failures(self) -> int:
        """Items without a verdict, counted as wrong."""
        return self.timed_out + self.crashed + self.out_of_memory

    def grade(self, responses: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """Verdicts of B responses against their references: bool [B]; an item without a verdict is False."""
        return self.score(responses, answers).right_B

    def score(self, responses: Sequence[str], answers: Sequence[str], *more: Sequence[str]) -> Scores:
        """Scores of B responses; `more` are further arguments of the grade function, B of each.

        Items travel in chunks that share one time limit. A chunk that exceeds it or loses its worker is graded again
        item by item, so only the guilty item fails.

        Raises:
            RunError: the workers keep dying between items, or do not answer at all; the grader breaks its contract.
        """
        if any(len(column) != len(responses) for column in (answers, *more)):
            counts = [len(column) for column in (answers, *more)]
            raise ValueError(f"{len(responses)} responses but {', '.join(map(str, counts))} answers")
        items = list(zip(responses, answers, *more, strict=True))
        scores = Scores(np.zeros(len(items), dtype=bool), np.full(len(items), np.nan))
        jobs, rebuilds = _chunks(responses, self.workers, self.chunk_items), 0
        while jobs:
            jobs, broken = self._run(jobs, items, scores)
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
        return scores

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

    def _run(self, jobs: list[list[int]], items: list[tuple[str, ...]], scores: Scores) -> tuple[list[list[int]], bool]:
        """Grade the items of every job into `scores`; return the jobs to run again, and whether the pool broke."""
        running: list[tuple[list[int], Future]] = []
        again: list[list[int]] = []
        broken = False
        for job in jobs:
            arguments = (self._grade_function, [items[i] for i in job], self.time_limit_s)
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
                again.extend(self._keep(job, future.result(), scores))
            elif isinstance(error, BrokenProcessPool):
                broken = True
                again.append(job)
            elif isinstance(error, RewardContractError):
                raise RunError(str(error)) from error
            elif isinstance(error, MemoryError):  # before or after the items, for example on the way
                again.extend(self._out_of_memory(job))
            elif not isinstance(error, TimeoutError | ProcessExpired):
                raise RunError(f"reward workers failed: {error!r}") from error
            elif len(job) > 1:
                again.extend([i] for i in job)
            elif isinstance(error, TimeoutError):
                self.timed_out += 1
            else:
                self.crashed += 1
        return again, broken

    def _keep(self, job: list[int], outcomes: list[tuple[int, float]], scores: Scores) -> list[list[int]]:
        """Enter a chunk's outcomes; return what is to be graded again, alone."""
        again = []
        for i, (verdict, reward) in zip(job, outcomes, strict=True):
            scores.right_B[i] = verdict == _RIGHT
            scores.rewards_B[i] = reward
            self.crashed += verdict == _RAISED
            if verdict == _NO_MEMORY and len(job) > 1:
                again.append([i])
            elif verdict == _NO_MEMORY:
                self.out_of_memory += 1
        return again

    def _out_of_memory(self, job: list[int]) -> list[list[int]]:
        if len(job) > 1:
            return [[i] for i in job]
        self.out_of_memory += 1
        return []

    def _started_pool(self) -> ProcessPool:
        own = self._grade_function if hasattr(self._grade_function, "__qualname__") else type(self._grade_function)
        context = SpawnContext() if own.__module__ == "__main__" else _BareSpawnContext()
        name = getattr(own, "__qualname__", repr(own))
        try:
            pickled = pickle.dumps(self._grade_function)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise RunError(f"reward workers did not start with the grader {name}: {error!r}") from error
        pool = ProcessPool(
            max_workers=self.workers,
            initializer=_prepare_worker,
            initargs=(pickled, self.memory_limit_mib),
            context=context,
        )
        try:
            probes = [pool.schedule(_get_ready, args=(self._grade_function,)) for _ in range(self.workers)]
            if wait(probes, timeout=START_LIMIT_S).not_done:
                raise RunError(f"reward workers did not start within {START_LIMIT_S:.0f} s")
            errors = [error for error in (probe.exception() for probe in probes) if error is not None]
            if errors and isinstance(errors[0], RewardContractError):
                raise RunError(str(errors[0])) from errors[0]
            if errors:
                raise RunError(f"reward workers did not start with the grader {name}: {errors[0]!r}") from errors[0]
        except BaseException:
            _stop(pool)
            raise
        return pool


def _chunks(responses: Sequence[str], workers: int, items: int) -> list[list[int]]:
    """Item numbers in jobs of at most `items` items and, where one item allows it, CHUNK_CHARACTERS characters."""
    most = min(items, max(1, -(-len(responses) // workers)))
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


def _prepare_worker(pickled_function: bytes, memory_limit_mib: int | None) -> None:
    # a grader stuck inside C code never reaches a Python handler; the default action ends the process at once
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(Exception):  # the probe of `_started_pool` meets it again, and tells it
        _get_ready(pickle.loads(pickled_function))  # of our own making
    if memory_limit_mib is not None:
        limit = psutil.Process().memory_info().vms + memory_limit_mib * 2**20
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _get_ready(grade_function: GradeFunction) -> None:
    """Reaching this body proves that the worker runs and has found the grade function."""
    prepare = getattr(grade_function, "prepare", None)
    if prepare is not None:
        prepare()


def _grade_chunk(
    grade_function: GradeFunction, items: list[tuple[str, ...]], time_limit_s: float
) -> list[tuple[int, float]]:
    # should the parent be killed, nobody enforces its limit: the kernel then ends this worker
    signal.setitimer(signal.ITIMER_REAL, time_limit_s + RESTART_LIMIT_S)
    try:
        score_many = getattr(grade_function, "score_many", None)
        if score_many is not None and len(items) > 1:
            try:
                return [_entry(result) for result in score_many(items)]
            except RewardContractError:
                raise
            except Exception:  # one of the items; alone, each shows what it does
                pass
        return [_outcome(grade_function, item) for item in items]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _outcome(grade_function: GradeFunction, item: tuple[str, ...]) -> tuple[int, float]:
    try:
        return _entry(grade_function(*item))
    except RewardContractError:
        raise
    except MemoryError:
        return _NO_MEMORY, float("nan")
    except Exception:  # whatever a grader raises costs its own item only
        return _RAISED, float("nan")


def _entry(result: bool | Score) -> tuple[int, float]:
    right, reward = result if isinstance(result, Score) else (result, float("nan"))
    return _RIGHT if right else _WRONG, float(reward)


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
