"""The HTTP client against a server of the test's own that says what vLLM's does."""

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable

import numpy as np
import pytest
from aiohttp import web

from dapo_megatron.errors import RunError
from dapo_megatron.rollout.engine import RolloutRequest
from dapo_megatron.rollout.vllm_client import EngineClient, EngineFailed
from dapo_megatron.rollout.vllm_secret import HEADER

REQUEST = RolloutRequest(5, np.array([7, 8, 9], np.int32), seed=2**64 - 3, max_new_tokens=6, temperature=0.7, top_p=0.9)
GOOD = {
    "finish_reason": "stop",
    "token_ids": [4, 5, 1],
    "logprobs": {"content": [{"token_id": t, "logprob": -0.5 * t, "rank": 1, "top_logprobs": []} for t in (4, 5, 1)]},
    "weight_versions": [{"version": "3", "start": 0, "end": 2}, {"version": "4", "start": 2, "end": 3}],
}


def against(handler: Callable[[web.Request], Awaitable[web.StreamResponse]], talk, **client_options):
    """Serve `handler` on all routes and let `talk` use a client; returns what `talk` does."""

    async def run():
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(app, keepalive_timeout=client_options.pop("keepalive", 75.0))
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        client = EngineClient(f"http://127.0.0.1:{port}", secret="s3", stop_tokens=[9, 1])
        try:
            return await talk(client)
        finally:
            await client.close()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(runner.cleanup(), 1.0)

    return asyncio.run(asyncio.wait_for(run(), 30))


def answering(choice: dict, status: int = 200):
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"choices": [choice], "usage": None}, status=status)

    return handler


def generate(client: EngineClient):
    return client.generate(REQUEST, time_limit_s=10)


def test_the_request_says_all_and_the_answer_becomes_a_completion():
    seen = {}

    async def handler(request: web.Request) -> web.Response:
        seen.update(path=request.path, secret=request.headers[HEADER], body=await request.json())
        return web.json_response({"choices": [GOOD]})

    completion = against(handler, generate)
    sampling = seen["body"]["sampling_params"]
    assert seen["path"] == "/inference/v1/generate" and seen["secret"] == "s3"
    assert seen["body"]["token_ids"] == [7, 8, 9]
    assert sampling["temperature"] == 0.7 and sampling["top_p"] == 0.9 and sampling["max_tokens"] == 6
    assert sampling["stop_token_ids"] == [1, 9] and sampling["ignore_eos"] and sampling["logprobs"] == 0
    assert 0 <= sampling["seed"] < 2**63 and not sampling["detokenize"]
    assert completion.ticket == 5 and completion.finish_reason == "stop"
    assert completion.tokens.tolist() == [4, 5, 1] and completion.tokens.dtype == np.int32
    np.testing.assert_allclose(completion.logprobs, [-2.0, -2.5, -0.5])
    assert completion.policy_versions.tolist() == [3, 3, 4]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"token_ids": [4, 5]}, "2 tokens with 3 log-probs"),
        ({"logprobs": None}, "3 tokens with 0 log-probs"),
        ({"weight_versions": None}, "without a policy version"),
        ({"weight_versions": [{"version": "default", "start": 0, "end": 3}]}, "unusable"),
        ({"finish_reason": "error"}, "finish_reason 'error'"),
        ({"token_ids": "abc"}, "unusable"),
    ],
)
def test_an_answer_that_lacks_something_is_no_completion(change, told):
    with pytest.raises(RunError, match=told) as caught:
        against(answering({**GOOD, **change}), generate)
    assert not isinstance(caught.value, EngineFailed)


@pytest.mark.parametrize(
    ("status", "kind"), [(400, RunError), (401, RunError), (500, EngineFailed), (503, EngineFailed)]
)
def test_a_refused_request_and_a_broken_engine_are_told_apart(status, kind):
    with pytest.raises(RunError, match=f"with {status}") as caught:
        against(answering(GOOD, status), generate)
    assert type(caught.value) is kind


def test_nothing_waits_longer_than_its_limit():
    async def silent(request: web.Request) -> web.Response:
        await asyncio.sleep(60)
        return web.Response()

    with pytest.raises(EngineFailed, match=r"did not answer /pause within 0 s"):
        against(silent, lambda client: client.post("/pause", time_limit_s=0.2))


def test_nobody_there():
    async def talk(_client):
        alone = EngineClient("http://127.0.0.1:9", secret="s", stop_tokens=[])
        try:
            await alone.post("/resume", time_limit_s=5)
        finally:
            await alone.close()

    with pytest.raises(EngineFailed, match=r"127\.0\.0\.1:9 is gone \(/resume"):
        against(answering(GOOD), talk)


def test_a_connection_that_the_server_drops_while_idle_costs_nothing():
    calls = []

    async def handler(request: web.Request) -> web.StreamResponse:
        calls.append(request.path)
        if len(calls) == 2:
            request.transport.close()  # as a server does whose keep-alive time ends just now
        return web.json_response({"choices": [GOOD]})

    async def talk(client):
        return [await client.generate(REQUEST, time_limit_s=5) for _ in range(2)]

    assert [c.tokens.tolist() for c in against(handler, talk)] == [[4, 5, 1]] * 2
    assert len(calls) == 3


def test_a_server_that_always_drops_the_connection_is_a_failed_engine():
    async def handler(request: web.Request) -> web.StreamResponse:
        request.transport.close()
        return web.Response()

    with pytest.raises(EngineFailed, match="is gone"):
        against(handler, generate)


def test_abort_names_requests_as_vllm_does():
    bodies = []

    async def handler(request: web.Request) -> web.Response:
        bodies.append((request.path, json.loads(await request.text())))
        return web.Response()

    against(handler, lambda client: client.abort([3, 8], time_limit_s=5))
    assert bodies == [("/abort_requests", {"request_ids": ["generate-tokens-3", "generate-tokens-8"]})]
