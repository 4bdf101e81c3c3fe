"""Programs graded by test cases, each case in a sandbox of its own (`sandbox.py`: what that guarantees).

The program never meets an expected output: it writes its output, or the JSON of what its function returned, and this
side compares. So printing "passed", leaving early or writing to the result's pipe by itself is worth what it writes,
and nothing more. What a program can still fake is skill: answers that it knows by heart, as where a question shows all
of its test cases.
"""

import json
import textwrap
from contextlib import suppress
from dataclasses import dataclass

from dapo_megatron.rewards.code_cases import TestCases, read_cases, same_output, same_result
from dapo_megatron.rewards.pool import RewardContractError, Score
from dapo_megatron.rewards.sandbox import Ran, Sandbox

FENCE = "```"
SPARE_OUTPUT = 65_536  # bytes beyond twice the expected output: more cannot be right

_sandbox: list[Sandbox] = []  # this worker's, once it has one


@dataclass(frozen=True)
class CodeTests:
    """A grade function (response, answer) → Score: the tests that the program in a response passes.

    Right are those that pass all. The reward is right_reward for all and wrong_reward for none; between these, with
    `fraction`, it grows with the share, else it is wrong_reward. A test that exceeds its time ends the grading: it and
    those behind it count as failed.

    Args:
        time_limit_s: wall time of one test in seconds.
        memory_limit_mib: address space of one test.
        max_tests: most cases that are run, those with the longest inputs.
    """

    time_limit_s: float
    memory_limit_mib: int
    max_tests: int
    fraction: bool
    right_reward: float
    wrong_reward: float

    def prepare(self) -> None:
        """Start this worker's sandbox, and try that it confines."""
        try:
            _open_sandbox().check()
        except OSError as error:
            raise RewardContractError(f"reward.grader=code cannot run programs here: {error}") from error

    def __call__(self, response: str, answer: str) -> Score:
        program, cases = last_program(response), read_cases(answer).hardest(self.max_tests)
        passed = 0 if program is None else self._passed(program, cases)
        share = passed / len(cases.inputs)
        right = share == 1.0
        earned = share if self.fraction else float(right)
        return Score(right, self.wrong_reward + (self.right_reward - self.wrong_reward) * earned)

    def _passed(self, program: str, cases: TestCases) -> int:
        passed = 0
        for given, expected in zip(cases.inputs, cases.outputs, strict=True):
            ran = self._run(program, cases.function, given, expected)
            passes = ran.output is not None and _matches(ran.output, expected, cases.function is not None)
            passed += passes
            if ran.late or not (passes or self.fraction):
                break
        return passed

    def _run(self, program: str, function: str | None, given, expected) -> Ran:
        length = len(expected.encode(errors="replace") if function is None else json.dumps(expected))
        try:
            return _open_sandbox().run(
                program,
                stdin=given if function is None else "",
                function=function,
                arguments=() if function is None else given,
                time_limit_s=self.time_limit_s,
                memory_limit_mib=self.memory_limit_mib,
                most_output=2 * length + SPARE_OUTPUT,
            )
        except OSError:
            close_sandbox()
            raise


def last_program(response: str) -> str | None:
    """The last closed block of a response between lines of ```; None without one.

    A line with ``` and a language begins a block anew, also where the last one was left open.
    """
    program: str | None = None
    block: list[str] | None = None
    for line in response.split("\n"):
        mark = line.strip()
        if mark == FENCE and block is not None:
            program, block = textwrap.dedent("\n".join(block)), None
        elif mark.startswith(FENCE):
            block = []
        elif block is not None:
            block.append(line)
    return program


def check_code() -> None:
    """Raises OSError where programs cannot be confined."""
    sandbox = Sandbox()
    try:
        sandbox.check()
    finally:
        sandbox.close()


def close_sandbox() -> None:
    """End this process's sandbox, if it has one."""
    while _sandbox:
        with suppress(OSError):
            _sandbox.pop().close()


def _open_sandbox() -> Sandbox:
    if not _sandbox:
        _sandbox.append(Sandbox())
    return _sandbox[0]


def _matches(output: bytes, expected, is_result: bool) -> bool:
    if not is_result:
        return same_output(output.decode(errors="replace"), expected)
    try:
        result = json.loads(output)
        if same_result(result, expected):
            return True
        # public sets wrap a result into a list of one
        return isinstance(expected, list) and len(expected) == 1 and same_result(result, expected[0])
    except (ValueError, RecursionError):
        return False
