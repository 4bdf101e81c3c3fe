import json
from pathlib import Path

import numpy as np
import pytest

from dapo_megatron.config.reward import Reward
from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.rewards.custom import check_custom
from dapo_megatron.rewards.grader import Grader

SIGNATURE = "def score(responses, answers, prompts):\n"


def write(folder: Path, body: str, before: str = "") -> str:
    path = folder / "my_reward.py"
    path.write_text(before + SIGNATURE + "".join(f"    {line}\n" for line in body.splitlines()))
    return f"{path}:score"


def grader(location: str, **settings) -> Grader:
    return Grader(Reward(custom=location, **settings))


def test_rewards_are_the_functions_own(tmp_path: Path):
    (tmp_path / "beside.py").write_text("POINTS = 0.5\n")
    body = "return [POINTS * len(r) - (a in p) for r, a, p in zip(responses, answers, prompts)]"
    with grader(write(tmp_path, body, "from beside import POINTS\n")) as scorer:
        right, rewards = scorer.score(["abc", "a", ""], ["1", "2", "3"], ["no", "2 is in", "3"])
    assert rewards.dtype == np.float32
    assert rewards.tolist() == [1.5, -0.5, -1.0]
    assert right.tolist() == [True, False, False]


def test_right_is_more_than_the_threshold(tmp_path: Path):
    location = write(tmp_path, "return [0.5 * len(r) for r in responses]")
    with grader(location, custom_threshold=0.5) as scorer:
        assert scorer.score(["", "a", "aa"], ["x"] * 3, ["y"] * 3)[0].tolist() == [False, False, True]


def test_numpy_rewards(tmp_path: Path):
    location = write(tmp_path, "return np.arange(len(responses), dtype=np.float32)", "import numpy as np\n")
    with grader(location) as scorer:
        assert scorer.score(["a", "b"], ["x"] * 2, ["y"] * 2)[1].tolist() == [0.0, 1.0]


def test_what_one_response_does_to_it_costs_that_response_only(tmp_path: Path, capfd):
    body = """for r in responses:
    if r == "sleep": time.sleep(600)
    if r == "exit": os._exit(1)
    if r == "raise": raise KeyError(r)
    if r == "greedy": bytearray(2**31)
return [2.0] * len(responses)"""
    responses = ["fine"] * 20
    for place, trouble in ((2, "sleep"), (7, "exit"), (12, "raise"), (18, "greedy")):
        responses[place] = trouble
    location = write(tmp_path, body, "import os, time\n")
    with grader(location, time_limit_s=1.0, memory_limit_mib=256, wrong=-3.0) as scorer:
        right, rewards = scorer.score(responses, ["x"] * 20, ["y"] * 20)
        assert rewards.tolist() == [2.0 if r == "fine" else -3.0 for r in responses]
        assert right.tolist() == [r == "fine" for r in responses]
        assert scorer.metrics() == {
            "grader/timed_out": 1.0,
            "grader/crashed": 2.0,
            "grader/out_of_memory": 1.0,
            "grader/failures": 4.0,
        }
        told = [line for line in capfd.readouterr().err.splitlines() if "raised" in line]
        assert len(told) == 1 and "KeyError('raise') in line 6" in told[0]  # and once a worker
        # steps count for themselves, so that a run that is resumed counts as one that was not
        scorer.begin_step()
        scorer.score(["fine", "raise"], ["x"] * 2, ["y"] * 2)
        assert scorer.metrics() == {
            "grader/timed_out": 0.0,
            "grader/crashed": 1.0,
            "grader/out_of_memory": 0.0,
            "grader/failures": 1.0,
        }
        assert scorer.failures == 5


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0] * (len(responses) + 1)", r"returned 3 rewards for 2 responses"),
        ("return 1.0", r"returned 1\.0 for 2 responses; it must return a sequence"),
        ("return None", r"returned None for 2 responses"),
        ("return ['good'] * len(responses)", r"returned \['good', 'good'\] for 2 responses"),
        ("return [float('nan')] * len(responses)", r"returned nan for the response 'a'; rewards must be finite"),
        ("return [float('inf')] * len(responses)", r"returned inf for the response 'a'"),
        (
            "return [0.0, 1e6][:len(responses)]",
            r"returned 1000000\.0 for the response 'b'; it must lie in -1000 …",
        ),
    ],
)
def test_a_broken_promise_ends_the_run_with_words(tmp_path: Path, body: str, message: str):
    with (
        grader(write(tmp_path, body)) as scorer,
        pytest.raises(RunError, match=r"reward\.custom=.*my_reward\.py:score " + message),
    ):
        scorer.score(["a", "b"], ["x"] * 2, ["y"] * 2)


@pytest.mark.parametrize("before", ["import no_such_module_here\n", "raise SystemExit(3)\n", "1 / 0\n"])
def test_a_file_that_cannot_be_imported_is_told_at_the_start(tmp_path: Path, before: str):
    with pytest.raises(RunError, match=r"reward\.custom=.*my_reward\.py:score cannot be imported: .*\("):
        grader(write(tmp_path, "return []", before))


def test_what_can_be_refused_is_refused_without_running_it(tmp_path: Path):
    location = write(tmp_path, "return []", "raise RuntimeError('ran')\n")
    check_custom(location)
    path = location.removesuffix(":score")
    with pytest.raises(RequestError, match=r"has no function other at its top level; it has score"):
        check_custom(f"{path}:other")
    with pytest.raises(RequestError, match=r"cannot read .*gone\.py: No such file"):
        check_custom(str(tmp_path / "gone.py:score"))
    for wrong in ("my_reward.py", "score", "my_reward:score", "my_reward.py:", "my_reward.py:a b"):
        with pytest.raises(RequestError, match=r"must be FILE\.py:FUNCTION"):
            check_custom(wrong)
    Path(path).write_text("def score(responses, answers):\n    return []\n")
    with pytest.raises(RequestError, match=r"score does not take prompts; it is called as score\(responses=…"):
        check_custom(location)
    Path(path).write_text("def score(**columns):\n    return []\n")
    check_custom(location)
    Path(path).write_text("def score(:\n")
    with pytest.raises(RequestError, match=r"is not valid Python: .*line 1"):
        check_custom(location)


def test_the_rules_verdicts_are_worth_right_and_wrong():
    with Grader(Reward(right=2.0, wrong=-0.5)) as scorer:
        right, rewards = scorer.score(["Answer: 1/2", "Answer: 2"], ["0.5", "1"], ["", ""])
        assert (right.tolist(), rewards.tolist()) == ([True, False], [2.0, -0.5])
        assert json.dumps(scorer.metrics()).count("0.0") == 4
