"""Programs graded by test cases, as a run has it: worker processes and their sandboxes."""

import json
import multiprocessing
import os
import signal
import time

import psutil
import pytest

from dapo_megatron.config.reward import Code, Reward
from dapo_megatron.errors import RequestError
from dapo_megatron.rewards import code_tests
from dapo_megatron.rewards.grader import Grader, check_grader
from tests.rewards.test_code_cases import PROBLEMS

SUM, ADD, PAIR = (json.loads(line)["answer"] for line in PROBLEMS.read_text(encoding="utf-8").splitlines())
SUM_PROGRAM = "import sys\nprint(sum(map(int, sys.stdin.read().split())))"
SECRET = "xyzzy-6174"
UNKNOWN = json.dumps({"fn_name": "add", "inputs": [[1, 2], [3, 4]], "outputs": [SECRET, SECRET]})


def fenced(program: str) -> str:
    return f"Let us see.\n```python\n{program}\n```\nThat is it."


@pytest.fixture(scope="module")
def grader():
    code = Code(score="fraction", time_limit_s=20.0, memory_limit_mib=256)
    with Grader(Reward(grader="code", code=code, right=3.0, wrong=1.0)) as grader:
        yield grader


PROGRAMS = [
    (SUM_PROGRAM, SUM, 1.0),
    ("print(sum(map(int, input().split())))", SUM, 0.5),
    ("print(3)\nraise ValueError", SUM, 0.0),
    ("def add(a, b):\n    print('noise')\n    return a + b", ADD, 1.0),
    ("class Solution:\n    def add(self, a, b):\n        return a + b", ADD, 1.0),
    ("def add(a, b):\n    return 3", ADD, 0.5),
    ("def add(a, b):\n    return '3'", ADD, 0.0),
    ("class Solution:\n    def pair(self, nums: List[int]) -> List[int]:\n        return nums[:2]", PAIR, 1.0),
    ("def pair(nums):\n    return nums[:1]", PAIR, 0.0),
    ("", ADD, 0.0),
]


def test_rewards_lie_between_wrong_and_right_by_the_share(grader: Grader):
    responses = [fenced(program) for program, _, _ in PROGRAMS]
    right, rewards = grader.score(
        [*responses, SUM_PROGRAM], [*[a for _, a, _ in PROGRAMS], SUM], [""] * (len(PROGRAMS) + 1)
    )
    assert rewards.tolist() == [1.0 + 2.0 * share for _, _, share in PROGRAMS] + [1.0]
    assert right.tolist() == [share == 1.0 for _, _, share in PROGRAMS] + [False]
    assert grader.failures == 0


HUNT = """
import gc, sys
def add(a, b):
    mark = "xyzzy" + "-"
    frame = sys._getframe()
    places = list(gc.get_objects())
    while frame:
        places += [*frame.f_locals.values(), *frame.f_globals.values()]
        frame = frame.f_back
    for place in places:
        if isinstance(place, (dict, list, tuple)):
            for value in place.values() if isinstance(place, dict) else place:
                if isinstance(value, str) and value.startswith(mark) and value != mark:
                    return value
"""
FORGERIES = {
    "printing the verdict": "print('passed: True')\ndef add(a, b): raise ValueError",
    "writing to the channel": "import os\nos.write(3, b'true')\nos._exit(0)",
    "writing a verdict to the channel": 'import os\nos.write(3, b\'{"passed": true, "right": true}\')\nos._exit(0)',
    "leaving early": "import os\nos._exit(0)",
    "an object that equals all": "class Any(str):\n    __eq__ = lambda *a: True\ndef add(a, b): return Any('x')",
    "another json": "import json\njson.dumps = lambda *a: 'true'\ndef add(a, b): return 0",
    "another exit": "import os\nos._exit = lambda *a: None\nraise SystemExit(0)",
    "deep nesting": "import os\nos.write(3, b'[' * 60000)\nos._exit(0)",
    "a number beyond reading": "import os\nos.write(3, b'9' * 60000)\nos._exit(0)",
    "not a number": "def add(a, b): return float('nan')",
    "looking for what is expected": HUNT,
}


def test_nothing_forges_a_result_or_hurts_the_worker(grader: Grader):
    responses = [fenced(program) for program in FORGERIES.values()]
    right, rewards = grader.score([*responses, fenced(SUM_PROGRAM)], [UNKNOWN] * len(responses) + [SUM], [""] * 12)
    assert dict(zip(FORGERIES, rewards, strict=False)) == dict.fromkeys(FORGERIES, 1.0)
    assert right.tolist() == [False] * len(responses) + [True]
    assert grader.failures == 0
    # the hunt itself works: it finds what lies in this process
    scope: dict = {"kept": [SECRET]}
    exec(HUNT, scope)
    assert scope["add"](1, 2) == SECRET


def direct(**changes) -> code_tests.CodeTests:
    settings = {
        "time_limit_s": 20.0, "memory_limit_mib": 256, "max_tests": 20, "fraction": True, "right_reward": 1.0,
        "wrong_reward": -1.0,
    }  # fmt: skip
    return code_tests.CodeTests(**settings | changes)


@pytest.fixture(scope="module")
def here():
    """A sandbox in this process, as a worker has it."""
    yield
    code_tests.close_sandbox()


def test_all_pass_and_the_number_of_tests(here):
    half = fenced("print(12)")
    assert direct()(half, SUM) == (False, 0.0)
    assert direct(fraction=False)(half, SUM) == (False, -1.0)
    assert direct(fraction=False)(fenced(SUM_PROGRAM), SUM) == (True, 1.0)
    assert direct(max_tests=1)(half, SUM) == (True, 1.0)  # the longer input


def test_a_late_test_ends_the_grading(here):
    answer = json.dumps({"inputs": ["1", "2", "3", "4"], "outputs": ["1"] * 4})
    program = "import time\nn = input()\nif n == '2': time.sleep(600)\nprint(1)"
    assert direct(time_limit_s=2.0)(fenced(program), answer) == (False, -0.5)


def test_a_sandbox_that_is_gone_costs_one_item(here):
    assert direct()(fenced(SUM_PROGRAM), SUM).right
    os.kill(code_tests._sandbox[0]._process.pid, signal.SIGKILL)
    time.sleep(0.2)
    with pytest.raises(OSError):
        direct()(fenced(SUM_PROGRAM), SUM)
    assert direct()(fenced(SUM_PROGRAM), SUM).right


def test_closing_ends_every_process_even_at_work():
    before = {child.pid for child in multiprocessing.active_children()}
    code = Code(time_limit_s=1.0, memory_limit_mib=256, max_tests=1)
    with Grader(Reward(grader="code", code=code)) as grader:
        workers = [c for c in psutil.Process().children() if c.pid not in before and "spawn_main" in str(c.cmdline())]
        below = [process for worker in workers for process in worker.children(recursive=True)]
        assert any("sandbox_child.py" in " ".join(process.cmdline()) for process in below)
        assert grader.score([fenced("while True: pass")], [SUM], [""])[0].tolist() == [False]
        assert grader.failures == 0
    _, alive = psutil.wait_procs(below, timeout=30)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_a_machine_that_cannot_confine_is_refused(monkeypatch: pytest.MonkeyPatch):
    reward = Reward(grader="code")
    check_grader(reward)
    with monkeypatch.context() as changed:
        changed.setattr("dapo_megatron.rewards.sandbox.platform.machine", lambda: "s390x")
        with pytest.raises(RequestError, match=r"reward\.grader=code cannot run programs on this machine: .*x86_64"):
            check_grader(reward)
    # a kernel on which the probe gets through
    monkeypatch.setattr("dapo_megatron.rewards.sandbox._PROBE", "print('open')")
    with pytest.raises(RequestError, match="the kernel does not confine programs"):
        check_grader(reward)
