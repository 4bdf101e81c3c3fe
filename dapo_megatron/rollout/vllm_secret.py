"""The shared secret in front of every route of an engine.

vLLM's own API key covers its /v1 paths alone, while its development routes can do anything to the engine.
"""

import hmac
import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

HEADER = "x-engine-secret"
VARIABLE = "DAPO_MEGATRON_ENGINE_SECRET"  # by environment, never on a command line, which others can read

Scope = MutableMapping[str, Any]


def make_secret() -> str:
    """A secret for one run: that of the environment if there is one (engines somebody else started), else a new one."""
    return os.environ.get(VARIABLE) or secrets.token_urlsafe(32)


class RequireSecret:
    """ASGI middleware: whoever comes without the secret gets 401, on every route.

    vLLM loads it by name (`--middleware`) in the API server's process.

    Raises:
        RuntimeError: the environment holds no secret, so the server does not start.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        secret = os.environ.get(VARIABLE)
        if not secret:
            raise RuntimeError(f"{VARIABLE} is not set; an engine without a secret is not started")
        self.app, self.secret = app, secret.encode()

    async def __call__(self, scope: Scope, receive: Callable, send: Callable) -> None:
        if scope["type"] in ("http", "websocket"):
            given = dict(scope["headers"]).get(HEADER.encode(), b"")
            if not hmac.compare_digest(given, self.secret):
                await _refuse(scope, send)
                return
        await self.app(scope, receive, send)


async def _refuse(scope: Scope, send: Callable) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
    await send({"type": "http.response.body", "body": b""})
