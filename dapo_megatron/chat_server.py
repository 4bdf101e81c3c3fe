"""Many requests to an OpenAI-compatible server: a few at once, every try under a time limit, mishaps retried."""

import asyncio
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dapo_megatron.errors import RequestError

Reply = TypeVar("Reply")

MOST_BYTES = 1 << 20  # of one answer
CONNECT_S = 10.0
FATAL = (400, 401, 403, 404, 405, 422)  # asking again would not help


class Mishap(Exception):
    """A try that another one may mend."""


@dataclass(frozen=True)
class NoReply:
    """A request without an answer, and why; `status` where the server refused it."""

    reason: str
    status: int | None = None


@dataclass
class ChatServer:
    """POST {url}/chat/completions.

    url: "http://host:port/v1". key: sent as bearer token when not empty. concurrency: requests under way at once.
    time_limit_s: of one try. tries: with waits of backoff_s, doubling, after connection failures, time-outs and the
    statuses 429 and 5xx. limit_s: of all requests of a call together; None = as long as their tries take.
    give_up_after: so many requests in a row without an answer, and the others of the call are not sent; None = never.
    headers: sent with every request.

    Raises:
        RequestError: url is no http address.
    """

    url: str
    key: str = ""
    concurrency: int = 16
    time_limit_s: float = 300.0
    tries: int = 4
    backoff_s: float = 1.0
    limit_s: float | None = None
    give_up_after: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_address(self.url)

    def ask(
        self, bodies: Sequence[dict[str, Any]], read: Callable[[bytes], Reply], *, raise_refusals: bool = False
    ) -> list[Reply | NoReply]:
        """What `read` makes of the answer to each body, in order; it may raise `Mishap` to have one asked again.

        Args:
            raise_refusals: a request that the server refuses ends the call.

        Raises:
            RequestError: with `raise_refusals`, what the server refused.
        """
        return asyncio.run(self._all(bodies, read, raise_refusals))

    async def _all(
        self, bodies: Sequence[dict[str, Any]], read: Callable[[bytes], Reply], raise_refusals: bool
    ) -> list[Reply | NoReply]:
        import aiohttp

        slots = asyncio.Semaphore(self.concurrency)
        headers = {**self.headers, **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        in_a_row = 0

        async def ask(http: aiohttp.ClientSession, body: dict[str, Any]) -> Reply | NoReply:
            nonlocal in_a_row
            async with slots:
                if self.give_up_after is not None and in_a_row >= self.give_up_after:
                    return NoReply(f"not asked after {in_a_row} others in a row had no answer")
                reply = await self._tried(http, body, read)
                in_a_row = in_a_row + 1 if isinstance(reply, NoReply) and reply.status is None else 0
                if raise_refusals and isinstance(reply, NoReply) and reply.status is not None:
                    raise RequestError(f"{self.url} refuses the request with {reply.reason}")
                return reply

        limit = aiohttp.ClientTimeout(total=self.time_limit_s, sock_connect=CONNECT_S)
        async with aiohttp.ClientSession(headers=headers, timeout=limit) as http:
            tasks = [asyncio.create_task(ask(http, body)) for body in bodies]
            try:
                if not tasks:
                    return []
                await asyncio.wait(tasks, timeout=self.limit_s, return_when=asyncio.FIRST_EXCEPTION)
                for task in tasks:
                    if task.done():
                        task.result()  # raises what it raised
                late = NoReply(f"no answer within {self.limit_s} s")
                return [task.result() if task.done() else late for task in tasks]
            finally:
                for task in tasks:
                    task.cancel()

    async def _tried(self, http: Any, body: dict[str, Any], read: Callable[[bytes], Reply]) -> Reply | NoReply:
        import aiohttp

        failure = ""
        for attempt in range(self.tries):
            if attempt:
                await asyncio.sleep(self.backoff_s * 2 ** (attempt - 1))
            try:
                return await self._once(http, body, read)
            except (aiohttp.ClientError, OSError, TimeoutError, Mishap) as error:
                failure = str(error) or type(error).__name__
        return NoReply(failure)

    async def _once(self, http: Any, body: dict[str, Any], read: Callable[[bytes], Reply]) -> Reply | NoReply:
        url = f"{self.url.rstrip('/')}/chat/completions"
        async with http.post(url, json=body, allow_redirects=False) as response:
            answer = await _limited(response)
            if response.status in FATAL:
                said = " ".join(answer[:200].decode("utf-8", "replace").split())
                return NoReply(f"status {response.status}: {said}", response.status)
            if response.status != 200:
                raise Mishap(f"status {response.status}")
        return read(answer)


def check_address(url: str) -> None:
    """Raises RequestError for what is no http address."""
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
        raise RequestError(f"{url!r} is not an address like http://host:8000/v1")


async def _limited(response: Any) -> bytes:
    parts, size = [], 0
    async for part in response.content.iter_chunked(1 << 16):
        size += len(part)
        if size > MOST_BYTES:
            raise Mishap(f"an answer of more than {MOST_BYTES} bytes")
        parts.append(part)
    return b"".join(parts)
