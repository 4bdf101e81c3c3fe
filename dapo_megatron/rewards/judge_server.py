"""A judge behind an OpenAI-compatible address, which sends the log-probs of its first token.

The address is the recipe's (`reward.judge.url`), or that of an engine which the run has started.
"""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dapo_megatron.chat_server import ChatServer, Mishap, NoReply, check_address
from dapo_megatron.config.reward import Judge
from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.rewards.judge_prompt import PROMPT, Case, render
from dapo_megatron.rewards.verdicts import TOP, Opinions, p_yes

GIVE_UP_AFTER = 16  # cases in a row without a reply: the others of the call are not asked


@dataclass(frozen=True)
class Place:
    """Where a judge is asked. model: its name there. key: a bearer token, headers: sent too. setting: for messages.

    clean: breaks what its tokenizer would read as control marks, beyond the usual ones.
    """

    url: str
    model: str
    setting: str
    key: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    clean: Callable[[str], str] = str


def check_server(settings: Judge) -> None:
    """Raises RequestError: no address, no model's name, an environment variable that is not set."""
    try:
        check_address(settings.url)
    except RequestError as error:
        raise RequestError(f"reward.judge.url={error}") from None
    if settings.model is None:
        raise RequestError("reward.judge.url needs reward.judge.model, the model's name at that server")
    if settings.key_variable is not None and not os.environ.get(settings.key_variable):
        raise RequestError(
            f"reward.judge.key_variable={settings.key_variable}: this environment variable is not set; export the "
            "server's key in it, or use null"
        )


class JudgeServer:
    """Asks the server of `settings.url`, or that `at` names, `settings.concurrency` cases at a time, one token each at
    temperature 0.

    A case that finds no reply, after `settings.retries` further tries or within `settings.limit_s` for all, is
    unreached; nothing waits longer. Once GIVE_UP_AFTER in a row have none, the rest of the call is not asked.

    Raises:
        RequestError: as `check_server`, without `at`.
    """

    def __init__(self, settings: Judge, at: Place | None = None, *, backoff_s: float = 1.0) -> None:
        self._at = at or _place(settings)
        self._wording = settings.prompt or PROMPT
        self._answered = False
        self._server = ChatServer(
            self._at.url,
            key=self._at.key,
            headers=self._at.headers,
            concurrency=settings.concurrency,
            time_limit_s=settings.timeout_s,
            tries=1 + settings.retries,
            backoff_s=backoff_s,
            limit_s=settings.limit_s,
            give_up_after=GIVE_UP_AFTER,
        )

    def ask(self, cases: Sequence[Case]) -> Opinions:
        """See `Judging`.

        Raises:
            RunError: since the start the server has refused every case, or sent log-probs with none of its replies.
        """
        replies = self._server.ask([self._body(case) for case in cases], _first_token)
        failed = [reply for reply in replies if isinstance(reply, NoReply)]
        refused = [reply for reply in failed if reply.status is not None]
        if cases and len(refused) == len(cases) and not self._answered:
            raise RunError(f"{self._at.setting} refuses every request: {refused[-1].reason}")
        answered = [reply for reply in replies if not isinstance(reply, NoReply)]
        if answered and not any(answered) and not self._answered:
            raise RunError(
                f"{self._at.setting}: the server sends no log-probs of the first token, of which "
                "P(YES) is made; use one that knows logprobs and top_logprobs"
            )
        self._answered |= any(answered)
        return Opinions(
            np.array([math.nan if isinstance(reply, NoReply) else p_yes(reply) for reply in replies], np.float64),
            np.array([not isinstance(reply, NoReply) for reply in replies], bool),
            failed[-1].reason if failed else "",
        )

    def _body(self, case: Case) -> dict[str, Any]:
        return {
            "model": self._at.model,
            "messages": [{"role": "user", "content": render(case, self._wording, self._at.clean)}],
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": TOP,
        }


def _place(settings: Judge) -> Place:
    check_server(settings)
    key = os.environ.get(settings.key_variable or "", "")
    return Place(settings.url, settings.model, f"reward.judge.url={settings.url}", key)


def _first_token(answer: bytes) -> list[tuple[str, float]]:
    """(token, log-prob) of the most probable first tokens in a chat completion; none where it tells none, as of a
    refusal."""
    try:
        choice = json.loads(answer)["choices"][0]
        content = (choice.get("logprobs") or {}).get("content")
        tokens = [(entry["token"], float(entry["logprob"])) for entry in content[0]["top_logprobs"]] if content else []
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise Mishap(f"not a chat completion with log-probs: {type(error).__name__}") from None
    if not all(isinstance(token, str) and not math.isnan(logprob) for token, logprob in tokens):
        raise Mishap("a log-prob that is no number")
    return tokens
