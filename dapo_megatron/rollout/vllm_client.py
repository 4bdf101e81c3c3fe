"""One vLLM server, spoken to over HTTP: token ids in, token ids and log-probs out, and the routes that steer it.

Every call has a deadline. vLLM never sees text: the tokenizer is ours alone.
"""

from collections.abc import Collection, Mapping
from typing import Any

import aiohttp
import msgspec
import numpy as np

from dapo_megatron.data.completions import Completion
from dapo_megatron.errors import RunError
from dapo_megatron.rollout.engine import RolloutRequest
from dapo_megatron.rollout.vllm_secret import HEADER

SEED_BITS = (1 << 63) - 1  # vLLM takes signed 64-bit seeds
CONNECT_S = 10.0
JSON = {"content-type": "application/json"}


class EngineFailed(RunError):
    """An engine does not answer, or answers that it cannot go on."""


class _Token(msgspec.Struct):
    token_id: int
    logprob: float


class _Logprobs(msgspec.Struct):
    content: list[_Token] | None = None


class _Span(msgspec.Struct):
    version: str
    start: int
    end: int


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None
    weight_versions: list[_Span] | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]


_ANSWER = msgspec.json.Decoder(_Answer)  # knows the few fields we read and skips the others


class EngineClient:
    """The HTTP side of one engine. Lives in one event loop.

    Args:
        address: "http://host:port".
        stop_tokens: ends of sequence; drawn ones are part of the completion.
    """

    def __init__(self, address: str, *, secret: str, stop_tokens: Collection[int]) -> None:
        self.address = address.rstrip("/")
        self.stop_tokens = sorted(stop_tokens)
        self._http = aiohttp.ClientSession(
            self.address,
            headers={HEADER: secret},
            # the fleet bounds what is under way; the server closes connections that idle for 5 s
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=2.0),
            timeout=aiohttp.ClientTimeout(total=None),  # each call brings its own
        )

    async def generate(self, request: RolloutRequest, *, time_limit_s: float) -> Completion:
        """Draw one completion.

        Raises:
            EngineFailed: no answer, or one that says the engine has failed.
            RunError: the request was refused, or the answer lacks tokens, log-probs or versions.
        """
        body = {
            "request_id": str(request.ticket),
            "token_ids": request.prompt_tokens.tolist(),
            "sampling_params": sampling_parameters(request, self.stop_tokens),
        }
        answer = await self._post("/inference/v1/generate", body, time_limit_s)
        try:
            return _completion(request.ticket, _ANSWER.decode(answer).choices[0])
        except (msgspec.DecodeError, LookupError, ValueError, TypeError) as error:
            raise RunError(f"rollout: engine {self.address} gave an unusable answer: {error}") from None

    async def abort(self, tickets: Collection[int], *, time_limit_s: float) -> None:
        """Take requests back; their `generate` returns what they have produced so far."""
        names = [f"generate-tokens-{ticket}" for ticket in tickets]
        await self.post("/abort_requests", {"request_ids": names}, time_limit_s=time_limit_s)

    async def post(self, path: str, body: Mapping[str, Any] | None = None, *, time_limit_s: float) -> Any:
        """Call a steering route; returns its JSON answer.

        Raises:
            EngineFailed: no answer in time, or one other than 200.
        """
        answer = await self._post(path, body or {}, time_limit_s)
        return msgspec.json.decode(answer) if answer else None

    async def healthy(self, *, time_limit_s: float) -> bool:
        """Whether the server and its engine are up."""
        try:
            async with self._http.get("/health", timeout=aiohttp.ClientTimeout(total=time_limit_s)) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def close(self) -> None:
        """Drop all connections."""
        await self._http.close()

    async def _post(self, path: str, body: Mapping[str, Any], time_limit_s: float, *, again: bool = True) -> bytes:
        limit = aiohttp.ClientTimeout(total=time_limit_s, sock_connect=CONNECT_S)
        try:
            async with self._http.post(path, data=msgspec.json.encode(body), headers=JSON, timeout=limit) as response:
                answer, status = await response.read(), response.status
        except TimeoutError:
            raise EngineFailed(
                f"rollout: engine {self.address} did not answer {path} within {time_limit_s:.0f} s"
            ) from None
        except (aiohttp.ClientError, RuntimeError) as error:  # RuntimeError: the session was closed meanwhile
            if again and isinstance(error, aiohttp.ServerDisconnectedError):  # an idle connection, closed just now
                return await self._post(path, body, time_limit_s, again=False)
            reason = str(error) or type(error).__name__
            raise EngineFailed(f"rollout: engine {self.address} is gone ({path}: {reason})") from None
        if status != 200:
            # 4xx: the engine is well and the request is not, so another engine would say the same
            kind = RunError if status < 500 else EngineFailed
            text = answer.decode(errors="replace")[:300]
            raise kind(f"rollout: engine {self.address} answered {path} with {status}: {text}")
        return answer


def sampling_parameters(request: RolloutRequest, stop_tokens: Collection[int]) -> dict[str, Any]:
    """A request as fields of vLLM's SamplingParams."""
    return {
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed & SEED_BITS,
        "max_tokens": request.max_new_tokens,
        "logprobs": 0,  # of the sampled token alone
        "stop_token_ids": list(stop_tokens),
        "ignore_eos": True,  # stop_token_ids says it all
        "detokenize": False,
    }


def _completion(ticket: int, choice: _Choice) -> Completion:
    tokens = np.asarray(choice.token_ids or [], np.int32)
    content = choice.logprobs.content or [] if choice.logprobs is not None else []
    logprobs = np.fromiter((token.logprob for token in content), np.float32, len(content))
    if len(logprobs) != len(tokens):
        raise ValueError(f"{len(tokens)} tokens with {len(logprobs)} log-probs")
    versions = np.full(len(tokens), -1, np.int32)
    for span in choice.weight_versions or ():
        if not span.version.isdecimal():
            raise ValueError(f"tokens of weight version {span.version!r}: the engine has no weights yet")
        versions[span.start : span.end] = int(span.version)
    if (versions < 0).any():
        raise ValueError("tokens without a policy version")
    reason = choice.finish_reason
    if reason not in ("stop", "length", "abort"):
        raise ValueError(f"finish_reason {reason!r}")
    return Completion(ticket, tokens, logprobs, reason, versions)
