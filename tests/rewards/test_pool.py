import contextlib
import multiprocessing
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.rewards.pool import GraderPool, RewardContractError, Score

ROOT = Path(__file__).parents[2]


def troubled_grade(response: str, answer: str) -> bool:
    """What a grader may do on an item that names it; otherwise right when the two are equal."""
    if response == "sleep":
        time.sleep(600)
    if response == "stuck in C":
        re.match(r"(a+)+$", "a" * 60 + "b")
    if response == "exit":
        os._exit(3)
    if response == "raise":
        raise ValueError("on purpose")
    if response == "deep":
        return troubled_grade(response, answer)
    if response == "greedy":
        return len(bytearray(700 * 2**20)) > 0
    return response == answer


def heavy_modules(response: str, answer: str) -> bool:
    return any(name in sys.modules for name in ("torch", "transformers", "megatron"))


def process_number(response: str, answer: str) -> bool:
    Path(answer).joinpath(str(os.getpid())).touch()
    return True


def gone(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    # a killed child of a killed parent stays a zombie where nobody reaps it
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it went away in between
        return True
    return status.rpartition(")")[2].split()[0] == "Z"


def wait_until(condition, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize("workers", [1, 2])
def test_verdicts_are_those_of_the_rule(workers: int):
    with GraderPool(workers, 20.0) as pool:
        for count in (0, 1, 63, 64, 65, 300):
            responses = [f"Answer: {i}" for i in range(count)]
            answers = [str(i if i % 3 else i + 1) for i in range(count)]
            right = pool.grade(responses, answers)
            assert right.dtype == bool
            assert right.tolist() == [i % 3 != 0 for i in range(count)]
        assert pool.failures == 0


def test_long_responses_and_broken_text():
    with GraderPool(1, 20.0) as pool:
        responses = ["\ud800 Answer: 1", "x" * 3_000_000 + "Answer: 2", "", "y" * 900_000, "Answer: 3\0"]
        assert pool.grade(responses, ["1", "2", "3", "4", "5"]).tolist() == [True, True, False, False, False]
        assert pool.failures == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_only_the_guilty_items_fail(workers: int):
    responses = ["fine"] * 70
    for place, trouble in ((3, "sleep"), (20, "stuck in C"), (40, "exit"), (50, "raise"), (69, "deep")):
        responses[place] = trouble
    with GraderPool(workers, 1.5, troubled_grade) as pool:
        right = pool.grade(responses, ["fine"] * 70)
        assert right.tolist() == [response == "fine" for response in responses]
        assert (pool.timed_out, pool.crashed, pool.failures) == (2, 3, 5)
        # and the pool still works
        assert pool.grade(["a", "b", "raise"], ["a", "a", "a"]).tolist() == [True, False, False]
        assert pool.failures == 6


def test_an_item_over_the_memory_limit_fails_alone():
    responses = ["fine"] * 70
    responses[5] = responses[66] = "greedy"
    with GraderPool(2, 20.0, troubled_grade, memory_limit_mib=256) as pool:
        assert pool.grade(responses, ["fine"] * 70).tolist() == [response == "fine" for response in responses]
        assert (pool.out_of_memory, pool.crashed, pool.timed_out, pool.failures) == (2, 0, 0, 2)
    with GraderPool(1, 20.0, troubled_grade) as pool:  # without a limit it is graded
        assert pool.grade(["greedy"], ["x"]).tolist() == [True]
        assert pool.failures == 0


class Careful:
    """A grader that needs longer to get ready than an item may take."""

    def prepare(self) -> None:
        time.sleep(1.0)

    def __call__(self, response: str, answer: str) -> bool:
        return troubled_grade(response, answer)


def test_getting_ready_does_not_count_as_grading():
    with GraderPool(1, 0.5, Careful()) as pool:
        assert pool.grade(["a", "exit", "b"], ["a", "a", "b"]).tolist() == [True, False, True]
        assert (pool.timed_out, pool.crashed) == (0, 1)


class Half:
    """Gives half a point; of several items at once only when none of them is odd."""

    def __call__(self, response: str, answer: str, prompt: str) -> Score:
        if response == "raise":
            raise ValueError("on purpose")
        if response == "break":
            raise RewardContractError("reward.custom=x.py:f broke its word")
        return Score(response == answer, 0.5 if prompt == "half" else 0.25)

    def score_many(self, items: list[tuple[str, str, str]]) -> list[Score]:
        assert len(items) > 1
        return [self(*item) for item in items]


def test_scores_and_several_items_at_once():
    with GraderPool(1, 20.0, Half()) as pool:
        scores = pool.score(["a", "b"], ["a", "a"], ["half", "other"])
        assert scores.right_B.tolist() == [True, False]
        assert scores.rewards_B.tolist() == [0.5, 0.25]
        scores = pool.score(["a", "raise", "b"], ["a", "a", "b"], ["half"] * 3)
        assert scores.right_B.tolist() == [True, False, True]
        assert scores.rewards_B[[0, 2]].tolist() == [0.5, 0.5] and np.isnan(scores.rewards_B[1])
        assert pool.crashed == 1
        with pytest.raises(RunError, match=r"reward\.custom=x\.py:f broke its word"):
            pool.score(["a", "break"], ["a", "a"], ["half"] * 2)
        with pytest.raises(ValueError, match="2 responses but 2, 1 answers"):
            pool.score(["a", "b"], ["a", "a"], ["half"])


def test_one_item_alone_may_fail():
    with GraderPool(1, 0.5, troubled_grade) as pool:
        assert pool.grade(["sleep"], ["sleep"]).tolist() == [False]
        assert pool.timed_out == 1


def test_workers_import_nothing_heavy_even_below_a_heavy_main_script(tmp_path: Path):
    with GraderPool(1, 20.0, heavy_modules) as pool:
        assert not pool.grade(["x"], ["x"]).any()
    script = tmp_path / "heavy_main.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        import torch
        from dapo_megatron.rewards.pool import GraderPool
        from test_pool import heavy_modules

        # no __main__ guard: a worker that ran this script again would start workers of its own
        with GraderPool(1, 20.0, heavy_modules) as pool:
            assert heavy_modules("", "")
            assert not pool.grade(["x"], ["x"]).any()
        """)
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    subprocess.run([sys.executable, script], check=True, timeout=120, env=environment)


def test_a_grade_function_of_the_main_script(tmp_path: Path):
    script = tmp_path / "own_grader.py"
    script.write_text(
        textwrap.dedent("""
        from dapo_megatron.rewards.pool import GraderPool

        def own(response, answer):
            return response.endswith(answer)

        if __name__ == "__main__":
            with GraderPool(1, 20.0, own) as pool:
                assert pool.grade(["abc", "abd"], ["c", "c"]).tolist() == [True, False]
        """)
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, script], check=True, timeout=120, env=environment)


def test_main_module_is_put_back():
    main = sys.modules["__main__"]
    with GraderPool(1, 20.0):
        pass
    assert sys.modules["__main__"] is main


def test_closing_leaves_no_process_even_with_a_stuck_grader(tmp_path: Path):
    before = {child.pid for child in multiprocessing.active_children()}
    pool = GraderPool(2, 300.0, troubled_grade)
    children = {child.pid for child in multiprocessing.active_children()} - before
    assert len(children) == 2

    def grade() -> None:
        with contextlib.suppress(RunError):  # told that the pool was closed, sooner or later
            pool.grade(["stuck in C"] * 4, [""] * 4)

    stuck = threading.Thread(target=grade, daemon=True)
    stuck.start()
    time.sleep(0.5)
    pool.close()
    pool.close()
    assert all(map(gone, children))
    assert {child.pid for child in multiprocessing.active_children()} == before


def test_workers_end_with_a_killed_parent(tmp_path: Path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""
        import sys, time
        from dapo_megatron.rewards.pool import GraderPool
        from test_pool import process_number

        pool = GraderPool(2, 20.0, process_number)
        pool.grade(["x"] * 200, [sys.argv[1]] * 200)
        print("ready", flush=True)
        time.sleep(600)
        """)
    )
    numbers = tmp_path / "numbers"
    numbers.mkdir()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    parent = subprocess.Popen([sys.executable, script, numbers], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert parent.stdout.readline() == "ready\n"
        workers = [int(path.name) for path in numbers.iterdir()]
        assert workers and not any(map(gone, workers))
    finally:
        parent.kill()
        parent.wait(30)
        parent.stdout.close()
    assert wait_until(lambda: all(map(gone, workers)))


@pytest.mark.slow
def test_a_busy_worker_ends_with_a_killed_parent(tmp_path: Path):
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent("""
        import multiprocessing, threading, time
        from dapo_megatron.rewards.pool import GraderPool
        from test_pool import troubled_grade

        pool = GraderPool(1, 1.0, troubled_grade)
        threading.Thread(target=pool.grade, args=(["stuck in C"], [""]), daemon=True).start()
        time.sleep(0.3)
        print(multiprocessing.active_children()[0].pid, flush=True)
        time.sleep(600)
        """)
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)])}
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        worker = int(parent.stdout.readline())
    finally:
        parent.kill()
        parent.wait(30)
        parent.stdout.close()
    assert not gone(worker)
    assert wait_until(lambda: gone(worker))


def test_a_worker_killed_while_idle_is_replaced():
    before = {child.pid for child in multiprocessing.active_children()}
    with GraderPool(1, 20.0) as pool:
        (worker,) = {child.pid for child in multiprocessing.active_children()} - before
        os.kill(worker, 9)
        assert wait_until(lambda: gone(worker))
        time.sleep(0.5)
        assert pool.grade(["Answer: 1", "Answer: 2"], ["1", "1"]).tolist() == [True, False]
        assert pool.failures == 0


def test_a_grade_function_that_workers_cannot_import_is_reported():
    before = {child.pid for child in multiprocessing.active_children()}
    with pytest.raises(RunError, match=r"reward workers did not start with the grader .*lambda"):
        GraderPool(1, 20.0, lambda response, answer: True)
    assert {child.pid for child in multiprocessing.active_children()} == before


@pytest.mark.parametrize(
    ("workers", "limit", "message"),
    [
        (0, 1.0, r"reward\.workers=0"),
        (1, 0.0, r"reward\.time_limit_s=0\.0"),
        (1, float("nan"), r"reward\.time_limit_s=nan"),
    ],
)
def test_bad_settings_are_refused(workers: int, limit: float, message: str):
    with pytest.raises(RequestError, match=message):
        GraderPool(workers, limit)


def test_too_little_memory_is_refused():
    with pytest.raises(RequestError, match=r"reward\.memory_limit_mib=10 .*at least 64"):
        GraderPool(1, 1.0, memory_limit_mib=10)


def test_lengths_must_agree():
    with GraderPool(1, 20.0) as pool, pytest.raises(ValueError, match="2 responses but 1 answers"):
        pool.grade(["a", "b"], ["a"])


def test_result_type():
    with GraderPool(1, 20.0) as pool:
        assert isinstance(pool.grade([], []), np.ndarray)
