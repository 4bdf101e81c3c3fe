"""What a judge's verdicts are worth beside the rule's."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.config.reward import Judge, Reward
from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.rewards.grader import Grader, check_grader
from dapo_megatron.rewards.judge import JudgeReward, z_scores
from dapo_megatron.rewards.judge_prompt import Case
from dapo_megatron.rewards.pool import GraderPool
from dapo_megatron.rewards.verdicts import p_yes, word_of
from tests.rewards.judges import ScriptedJudge, chat_answer, first_token, serving

ANSWERS = ["Western blot", "12", "muscles", "Bi", "Bi", "30cm"]
RESPONSES = ["Answer: western blot test", "so 12\nAnswer: 12", "Answer: liver", "hm", "", "Answer: 30 cm or 40"]
P_YES = {"western blot test": 0.9, "12": 0.2, "liver": 0.1, "hm": math.nan, "30 cm or 40": None}


@pytest.fixture(scope="module")
def pool():
    with GraderPool(1, 20.0) as pool:
        yield pool


def judged(pool: GraderPool, judge: ScriptedJudge, right: float = 1.0, wrong: float = -1.0, **settings) -> JudgeReward:
    return JudgeReward(Reward(grader="judge", right=right, wrong=wrong, judge=Judge(**settings)), judge, pool)


def by_script(case: Case) -> float | None:
    return P_YES[case.answer]


def test_the_rule_comes_first_and_decides_where_the_judge_does_not(pool: GraderPool):
    judge = ScriptedJudge(by_script)
    reward = judged(pool, judge)
    scores = reward.score(RESPONSES, ANSWERS, ["q"] * 6)
    assert [case.answer for case in judge.asked[0]] == ["western blot test", "liver", "hm", "30 cm or 40"]
    assert judge.asked[0][0] == Case("q", "western blot test", "Western blot")
    assert scores.right_B.tolist() == [True, True, False, False, False, False]
    assert scores.rewards_B == pytest.approx([0.8, 1.0, -0.8, -1.0, -1.0, -1.0])
    assert reward.metrics() == pytest.approx(
        {
            "judge/judged": 2, "judge/no_verdict": 1, "judge/unreachable": 1, "judge/fallbacks": 2,
            "judge/p_yes": 0.5, "judge/agreement": 0.5,
        }
    )  # fmt: skip
    reward.begin_step()
    assert reward.metrics() == dict.fromkeys(
        ("judge/judged", "judge/no_verdict", "judge/unreachable", "judge/fallbacks"), 0.0
    )


def test_binary_rewards_and_a_judge_that_sees_all(pool: GraderPool):
    judge = ScriptedJudge(by_script)
    reward = judged(pool, judge, mode="binary", rule_first=False, right=2.0, wrong=0.0)
    scores = reward.score(RESPONSES, ANSWERS, ["q"] * 6)
    assert scores.rewards_B.tolist() == [2.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert scores.right_B.tolist() == [True, True, False, False, False, False]  # by the rule, or by the judge
    assert reward.metrics()["judge/agreement"] == pytest.approx(1 / 3)  # of western blot, 12 and liver


def test_equal_cases_are_asked_once(pool: GraderPool):
    judge = ScriptedJudge(lambda case: 0.75 if case.question == "a" else 0.25)
    scores = judged(pool, judge).score(["Answer: x"] * 4, ["y"] * 4, ["a", "b", "a", "a"])
    assert len(judge.asked[0]) == 2
    assert scores.rewards_B.tolist() == [0.5, -0.5, 0.5, 0.5]
    assert judged(pool, judge).score([], [], []).rewards_B.shape == (0,)


def test_a_run_may_stop_where_the_judge_says_nothing(pool: GraderPool):
    reward = judged(pool, ScriptedJudge(by_script), fallback="stop")
    with pytest.raises(RunError, match=r"no verdict on the final answer 'hm': .*reward\.judge\.fallback=rule"):
        reward.score(RESPONSES[:4], ANSWERS[:4], ["q"] * 4)


@given(st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=40))
def test_z_scores(rewards: list[float]):
    found = z_scores(np.array(rewards))
    assert np.abs(found).max() <= math.sqrt(len(rewards) - 1) * (1 + 1e-9)
    if min(rewards) == max(rewards):
        assert not found.any()
    elif np.std(rewards) > 1e-3:
        assert found.mean() == pytest.approx(0, abs=1e-6) and found.std() == pytest.approx(1)
        assert (np.diff(found[np.argsort(rewards)]) >= 0).all()


def test_z_scored_rewards(pool: GraderPool):
    reward = judged(pool, ScriptedJudge(lambda case: float(case.answer)), normalise="z-score")
    scores = reward.score(["Answer: 0.25", "Answer: 0.75", "Answer: 7"], ["x", "x", "7"], ["q"] * 3)
    values = np.array([0.25, 0.75, 1.0])  # the third is right by the rule
    assert scores.rewards_B == pytest.approx((values - values.mean()) / values.std())


@given(st.floats(0, 1), st.floats(0.01, 1), st.floats(-30, 0))
def test_p_yes_of_all_spellings(p: float, mass: float, other: float):
    tokens = [("YES", 0.5 * p * mass), (" Yes", 0.5 * p * mass), ("▁no", (1 - p) * mass)]
    logs = [(token, math.log(share)) for token, share in tokens if share > 0]
    assert p_yes([*logs, ("Maybe", other)]) == pytest.approx(p, abs=1e-9)


def test_words():
    assert [word_of(t) for t in ("YES", " yes", "Ġno", "No\n", "NOT", "Y", "", "Yes.")] == [
        "YES", "YES", "NO", "NO", None, None, None, None,
    ]  # fmt: skip
    assert math.isnan(p_yes([("The", -0.1), ("N", -3.0)])) and math.isnan(p_yes([]))


def test_the_grader_of_a_recipe_with_a_server():
    with serving(lambda prompt: chat_answer(first_token(0.75 if '"two"' in prompt else 0.25))) as (url, requests):
        reward = Reward(grader="judge", judge=Judge(url=url, model="m"))
        check_grader(reward)
        with Grader(reward) as grader:
            right, rewards = grader.score(["Answer: two", "Answer: 3", "Answer: 2"], ["2"] * 3, ["1+1?"] * 3)
            assert right.tolist() == [True, False, True]
            assert rewards.dtype == np.float32 and rewards.tolist() == pytest.approx([0.5, -0.5, 1.0])
            assert {"judge/judged": 2.0, "grader/failures": 0.0}.items() <= grader.metrics().items()
            grader.begin_step()
            assert grader.metrics()["judge/judged"] == 0
    assert len(requests) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"reward\.grader=judge needs reward\.judge\.model"),
        ({"model": "nowhere"}, r"reward\.judge\.model=nowhere is not a folder"),
        ({"url": "localhost", "model": "m"}, r"reward\.judge\.url='localhost' is not an address like http"),
        ({"url": "http://h/v1"}, r"reward\.judge\.url needs reward\.judge\.model"),
        ({"url": "http://h/v1", "model": "m", "key_variable": "NO_SUCH_KEY"}, "NO_SUCH_KEY: this environment variable"),
        ({"url": "http://h/v1", "model": "m", "prompt": "{answer}?"}, r"holds \{reference\} 0 times"),
        ({"url": "http://h/v1", "model": "m", "prompt": "{answer}{reference}{answer}"}, r"holds \{answer\} 2 times"),
    ],
)
def test_what_is_no_judge_is_refused_before_launch(settings: dict, message: str):
    with pytest.raises(RequestError, match=message):
        check_grader(Reward(grader="judge", judge=Judge(**settings)))
