"""Answers graded a second on one core: in this process, and through the pool of one worker that a run uses.

    python tools/bench_rewards.py [--items 20000] [--repeats 7] [--output FILE.csv]

Integer answers by the rule, at the end of a short and of a long response; LaTeX answers that only math-verify can
compare; programs by test cases, where an item is one test in a sandbox of its own. Every verdict is checked. Rates are
medians over the repeats: per second of wall time, and per second of CPU time of all processes that took part, which is
what a core gives where others work on the machine too.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dapo_megatron.config.reward import Code, Reward  # noqa: E402
from dapo_megatron.errors import RequestError, RunError, exit_with_message  # noqa: E402
from dapo_megatron.rewards import grade  # noqa: E402
from dapo_megatron.rewards.code_tests import CodeTests, close_sandbox  # noqa: E402
from dapo_megatron.rewards.equivalence import load as load_mathematics  # noqa: E402
from dapo_megatron.rewards.grader import Grader  # noqa: E402
from tools.bench_record import machine, print_table, quantile, write_rows  # noqa: E402

INTEGERS_WANTED = 2000.0  # a second a core
SHORT, LONG = 500, 20_000  # characters of a response; the latter are some 5,000 tokens
TESTS_A_PROGRAM = 10
LATEX = [
    (r"\sqrt{12}", r"2\sqrt{3}"), (r"1/\sqrt{3}", r"\frac{\sqrt{3}}{3}"), ("1+3x", "3x+1"), (r"3\pi", r"2\pi"),
    ("(x-1)(x+1)", "x^2-1"), (r"-\sqrt{3}", r"\sqrt{3}"), ("x<5", r"(-\infty,5)"), (r"\{2,1\}", r"\{1,2\}"),
]  # fmt: skip
LATEX_WRONG = {r"3\pi", r"-\sqrt{3}"}
# time limits for machines with other work
RULE = Reward(time_limit_s=60.0)
CODE = Reward(grader="code", code=Code(time_limit_s=60.0))
PROGRAM = "Like this:\n```python\na, b = map(int, input().split())\nprint(a + b)\n```"
FUNCTION = (
    "Like this:\n```python\nclass Solution:\n    def add(self, a: int, b: int) -> int:\n        return a + b\n```"
)


@dataclass(frozen=True)
class Task:
    """Responses and answers with the verdicts they must get; `tests` items are in each."""

    name: str
    reward: Reward
    responses: list[str]
    answers: list[str]
    right: list[bool]
    tests: int = 1


@dataclass(frozen=True)
class Row:
    """One task in one place; the machine's columns come last."""

    task: str
    place: str
    items: int
    seconds: float  # median
    seconds_p20: float
    seconds_p80: float
    per_second: float
    per_cpu_second: float
    repeats: int
    machine: str
    cores: int
    load: float  # processes that wanted a core, the mean of a minute, before the run
    python: str
    math_verify: str
    commit: str


def tasks(items: int) -> Iterator[Task]:
    """What is graded: `items` integer answers; a fifth as many behind long responses, a fortieth in LaTeX, and a
    hundredth as many tests."""
    source = random.Random(0)
    numbers = [source.randrange(10**6) for _ in range(items)]
    right = [source.random() < 0.5 for _ in numbers]
    written = [f"{n if r else n + 1:,}" for n, r in zip(numbers, right, strict=True)]
    step = "Then 12 + 30 = 42, so we check $x^{2}$ again. "
    for length, count in ((SHORT, items), (LONG, max(1, items // 5))):
        text = (step * (length // len(step) + 1))[:length]
        responses = [f"{text}\nAnswer: {answer}" for answer in written[:count]]
        name = f"integers, {length:,} characters"
        yield Task(name, RULE, responses, [str(n) for n in numbers[:count]], right[:count])
    pairs = [LATEX[i % len(LATEX)] for i in range(max(len(LATEX), items // 40))]
    responses = [f"so \\boxed{{{given}}}" for given, _ in pairs]
    yield Task(
        "LaTeX, math-verify",
        RULE,
        responses,
        [b for _, b in pairs],
        [given not in LATEX_WRONG for given, _ in pairs],
    )
    programs = max(1, items // 100 // TESTS_A_PROGRAM)
    sums = [(source.randrange(1000), source.randrange(1000)) for _ in range(TESTS_A_PROGRAM)]
    stdin = {"inputs": [f"{a} {b}\n" for a, b in sums], "outputs": [f"{a + b}\n" for a, b in sums]}
    calls = {"fn_name": "add", "inputs": [[a, b] for a, b in sums], "outputs": [a + b for a, b in sums]}
    for name, program, cases in (("code tests, stdin", PROGRAM, stdin), ("code tests, calls", FUNCTION, calls)):
        answers, verdicts = [json.dumps(cases)] * programs, [True] * programs
        yield Task(name, CODE, [program] * programs, answers, verdicts, TESTS_A_PROGRAM)


def measure(task: Task, place: str, repeats: int) -> Row:
    """Grade a task `repeats` times, after one time to warm up.

    Raises:
        RunError: a verdict is wrong.
    """
    load, seconds, cpu_seconds = os.getloadavg()[0], [], []
    with _grading(task, place) as graded:
        for i in range(repeats + 1):
            cpu, started = _cpu_seconds(), time.perf_counter()
            verdicts = graded()
            if i:
                seconds.append(time.perf_counter() - started)
                cpu_seconds.append(_cpu_seconds() - cpu)
            if verdicts != task.right:
                raise RunError(
                    f"{task.name}, {place}: {sum(map(bool.__ne__, verdicts, task.right))} verdicts are wrong"
                )
    items, median = len(task.responses) * task.tests, statistics.median(seconds)
    return Row(
        task=task.name,
        place=place,
        items=items,
        seconds=median,
        seconds_p20=quantile(seconds, 0.2),
        seconds_p80=quantile(seconds, 0.8),
        per_second=items / median,
        per_cpu_second=items / max(statistics.median(cpu_seconds), 0.001),
        repeats=repeats,
        python=platform.python_version(),
        math_verify=version("math-verify"),
        **machine(load),
    )


@contextmanager
def _grading(task: Task, place: str) -> Iterator[Callable[[], list[bool]]]:
    """A function that grades the whole task in that place."""
    if place == "pool, 1 worker":
        with Grader(task.reward) as grader:
            yield lambda: grader.score(task.responses, task.answers, [""] * len(task.answers))[0].tolist()
            if grader.failures:
                raise RunError(f"{task.name}: {grader.failures} responses got no verdict")
        return
    one = grade
    if task.reward.method == "code":
        code = task.reward.code
        tests = CodeTests(code.time_limit_s, code.memory_limit_mib, code.max_tests, False, 1.0, -1.0)
        one = lambda response, answer: tests(response, answer).right  # noqa: E731
    load_mathematics()
    try:
        yield lambda: [
            bool(one(response, answer)) for response, answer in zip(task.responses, task.answers, strict=True)
        ]
    finally:
        close_sandbox()


def _cpu_seconds() -> float:
    """CPU time so far of this process and all below it, those that ended included; of others in ticks of 10 ms."""
    me = psutil.Process()
    ended = me.cpu_times()
    total = time.process_time() + ended.children_user + ended.children_system
    for process in me.children(recursive=True):
        times = process.cpu_times()
        total += times.user + times.system + times.children_user + times.children_system
    return total


def _print_table(rows: Sequence[Row]) -> None:
    heads = ("", "", "items", "s (median)", "a second", "a CPU second")
    lines = [
        (
            row.task, row.place, f"{row.items:,}", f"{row.seconds:.3f}", f"{row.per_second:,.0f}",
            f"{row.per_cpu_second:,.0f}",
        )
        for row in rows
    ]  # fmt: skip
    print_table(heads, lines, left=2)


def _verdicts(rows: Sequence[Row]) -> None:
    for row in rows:
        if row.task.startswith("integers"):
            met = "met" if row.per_cpu_second >= INTEGERS_WANTED else "MISSED"
            print(f"{row.task}, {row.place}: {row.per_cpu_second:,.0f} a core (wanted {INTEGERS_WANTED:,.0f}): {met}")


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=20_000, help="integer answers; others in proportion")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "benchmarks" / "rewards-cpu.csv")
    options = parser.parse_args()
    with exit_with_message():
        for name in ("items", "repeats"):
            if getattr(options, name) < 1:
                raise RequestError(f"--{name} {getattr(options, name)}: at least 1")
        rows = []
        for task in tasks(options.items):
            for place in ("this process", "pool, 1 worker"):
                rows.append(measure(task, place, options.repeats))
                print(f"{task.name}, {place}: {rows[-1].seconds:.3f} s", file=sys.stderr)
        _print_table(rows)
        print()
        _verdicts(rows)
        write_rows(rows, options.output)
        print(f"written to {options.output}")


if __name__ == "__main__":
    main()
