"""A judge behind an address: what is sent, what is made of the replies, and what happens when there are none."""

import json
import math
import threading

import pytest

from dapo_megatron.config.reward import Judge
from dapo_megatron.errors import RunError
from dapo_megatron.rewards.judge_prompt import Case
from dapo_megatron.rewards.judge_server import GIVE_UP_AFTER, JudgeServer
from tests.rewards.judges import chat_answer, first_token, serving


def server(url: str, **settings) -> JudgeServer:
    return JudgeServer(Judge(**{"url": url, "model": "m", "timeout_s": 10.0, **settings}), backoff_s=0.01)


def cases(*answers: str) -> list[Case]:
    return [Case("q", answer, "r") for answer in answers]


def word(prompt: str) -> str:
    """The answer inside a prompt."""
    return prompt.split('Final answer: "')[1].split('"')[0]


def test_requests_and_verdicts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_KEY", "secret")
    replies = {
        "right": chat_answer(first_token(0.9)),
        "wrong": chat_answer(first_token(0.2)),
        "neither": chat_answer([("The", -0.1), ("It", -2.0)]),
    }
    with serving(lambda prompt: replies[word(prompt)]) as (url, requests):
        opinions = server(url, key_variable="JUDGE_KEY").ask(cases("right", "wrong", "neither"))
    assert opinions.p_yes_B[:2] == pytest.approx([0.9, 0.2]) and math.isnan(opinions.p_yes_B[2])
    assert opinions.reached_B.all() and opinions.trouble == ""
    for request in requests:
        assert request["path"] == "/v1/chat/completions" and request["key"] == "Bearer secret"
        assert (request["max_tokens"], request["temperature"], request["logprobs"]) == (1, 0, True)
        assert len(request["messages"]) == 1 and request["model"] == "m"


def test_mishaps_are_retried_and_what_stays_out_is_told():
    tries: dict[str, int] = {}
    lock = threading.Lock()

    def answer(prompt: str) -> bytes | int:
        name = word(prompt)
        with lock:
            tries[name] = tries.get(name, 0) + 1
        if name == "late" and tries[name] == 3:
            return chat_answer(first_token(0.6))
        return {"refused": 400, "garbage": b"<html>"}.get(name, 503)

    with serving(answer) as (url, _):
        judge = server(url, retries=2)
        opinions = judge.ask(cases("late", "never", "refused", "garbage"))
    assert tries == {"late": 3, "never": 3, "refused": 1, "garbage": 3}
    assert opinions.reached_B.tolist() == [True, False, False, False]
    assert opinions.p_yes_B[0] == pytest.approx(0.6)
    assert opinions.trouble.startswith("not a chat completion with log-probs")
    with serving(lambda prompt: 401) as (url, _):
        judge._server.url = url
        assert not judge.ask(cases("a")).reached_B.any(), "a server that has answered may refuse for a while"


def test_a_reply_without_log_probs_is_no_verdict_once_others_had_some():
    def completion(logprobs: dict | None) -> bytes:
        message = {"role": "assistant", "content": None, "refusal": "I will not."}
        return json.dumps({"choices": [{"index": 0, "message": message, "logprobs": logprobs}]}).encode()

    without = {"null": None, "refusal": {"content": None, "refusal": []}, "empty": {"content": []}}
    replies = {name: completion(logprobs) for name, logprobs in without.items()}
    with serving(lambda prompt: replies.get(word(prompt)) or chat_answer(first_token(0.9))) as (url, _):
        judge = server(url, retries=0)
        first = judge.ask(cases("null", "good"))
        later = judge.ask(cases(*replies))
    assert math.isnan(first.p_yes_B[0]) and first.p_yes_B[1] == pytest.approx(0.9)
    assert first.reached_B.all() and later.reached_B.all() and all(math.isnan(p) for p in later.p_yes_B)


def test_a_server_that_is_down_or_hangs_holds_nothing_up():
    assert not server("http://127.0.0.1:9/v1", retries=1).ask(cases("a", "b")).reached_B.any()
    with serving(lambda prompt: 60.0) as (url, requests):
        opinions = server(url, timeout_s=0.1, retries=1, concurrency=4).ask(cases(*map(str, range(60))))
        assert not opinions.reached_B.any()
        assert len(requests) <= 2 * (GIVE_UP_AFTER + 4), "after so many in a row the others are not asked"
    with serving(lambda prompt: 60.0 if word(prompt) == "slow" else chat_answer(first_token(0.5))) as (url, _):
        opinions = server(url, timeout_s=60.0, limit_s=1.0).ask(cases("slow", "quick"))
        assert opinions.reached_B.tolist() == [False, True] and "within 1.0 s" in opinions.trouble


def test_a_server_that_never_could_ends_the_run_with_words():
    with serving(lambda prompt: 401) as (url, _), pytest.raises(RunError, match="refuses every request: status 401"):
        server(url).ask(cases("a", "b"))
    with serving(lambda prompt: chat_answer([])) as (url, _), pytest.raises(RunError, match="sends no log-probs"):
        server(url).ask(cases("a"))
    assert len(server("http://127.0.0.1:9/v1").ask([]).p_yes_B) == 0
