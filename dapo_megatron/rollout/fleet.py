"""All engines behind one queue: a request goes to the engine with the least work, as soon as that one has room.

Implements the rollout protocol of `rollout/engine.py` for servers, on rank 0. An event loop of its own (a thread) talks
to the engines, so that nothing waits while the learner computes.
"""

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from dapo_megatron.data.completions import Completion
from dapo_megatron.errors import Interrupted, RunError
from dapo_megatron.rollout.engine import PartialCompletion, RolloutRequest
from dapo_megatron.rollout.vllm_client import EngineFailed

STEER_S = 60.0  # longest wait for a steering route
LOOK_EVERY_S = 1.0  # for a request to stop, while rollouts are drawn
HEALTH_EVERY_S, HEALTH_LIMIT_S, HEALTH_MISSES = 10.0, 30.0, 3  # an engine that misses so many checks in a row is lost


class Client(Protocol):
    """What the fleet asks of an engine; `vllm_client.EngineClient` is one."""

    address: str

    async def generate(self, request: RolloutRequest, *, time_limit_s: float) -> Completion: ...

    async def abort(self, tickets: Collection[int], *, time_limit_s: float) -> None: ...

    async def post(self, path: str, body: Any = None, *, time_limit_s: float) -> Any: ...

    async def healthy(self, *, time_limit_s: float) -> bool: ...

    async def close(self) -> None: ...


class EnginesLost(RunError):
    """Engines that died while requests were out; their requests are queued again. `engines`: their indices."""

    def __init__(self, engines: Collection[int], reasons: Collection[str]) -> None:
        super().__init__("\n".join(reasons), on_every_rank=True)
        self.engines = sorted(engines)


@dataclass
class _Seat:
    """One engine's part of the work. Not `open`: it has no weights yet and gets no requests."""

    client: Client
    open: bool = False
    running: dict[int, RolloutRequest] = field(default_factory=dict)
    failure: str | None = None
    misses: int = 0


class Fleet:
    """The engines of a run.

    Args:
        connect: makes a client for an address, inside the event loop.
        capacity: requests an engine works on at once; the rest wait here, so that the last ones go where there is room.
        time_limit_s: for one completion.
    """

    def __init__(
        self, connect: Callable[[str], Client], addresses: Sequence[str], *, capacity: int, time_limit_s: float
    ) -> None:
        self._connect, self._capacity = connect, capacity
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rollout-fleet", daemon=True)
        self._thread.start()
        self._waiting: deque[RolloutRequest] = deque()
        self._done: queue.SimpleQueue[Completion | Exception | None] = queue.SimpleQueue()  # None: an engine was lost
        self._tasks: set[asyncio.Task] = set()
        self._out = 0  # submitted and not yet collected
        self._time_limit_s = time_limit_s
        self._seats = [_Seat(self.call(self._make(address))) for address in addresses]
        self._watch = self.start(self._look_after_all())

    async def _make(self, address: str) -> Client:
        return self._connect(address)

    # the rollout protocol

    def submit(self, requests: Sequence[RolloutRequest]) -> list[int]:
        """Queue requests and start as many as there is room for."""
        self._out += len(requests)

        def enqueue() -> None:
            self._waiting.extend(requests)
            self._fill()

        self._loop.call_soon_threadsafe(enqueue)
        return [request.ticket for request in requests]

    def collect(
        self, until: int | None = None, *, time_limit_s: float, stopping: Callable[[], bool] = lambda: False
    ) -> list[Completion]:
        """Completions as they finish, at least `until` of them (None: all that were submitted).

        Raises:
            Interrupted: `stopping`, which is asked about once a second, said so; what has come is kept.
            EnginesLost: engines died; nothing is lost by it: `replace` them, and collect again.
            RunError: not done within the time limit.
        """
        deadline = time.monotonic() + time_limit_s
        wanted = self._out if until is None else min(until, self._out)
        done: list[Completion] = []
        while len(done) < wanted:
            if stopping():
                self._put_back(done)
                raise Interrupted
            left_s = deadline - time.monotonic()
            try:
                item = self._done.get(timeout=min(max(0.0, left_s), LOOK_EVERY_S))
            except queue.Empty:
                if left_s > LOOK_EVERY_S:
                    continue
                self._put_back(done)
                raise RunError(
                    f"rollout: {self._out} requests unfinished after rollout.time_limit_s={time_limit_s:.0f}"
                ) from None
            if item is None:
                self._put_back(done)
                if lost := self.lost():
                    if stopping():  # what stops the run may have ended the engines too
                        raise Interrupted
                    raise EnginesLost(lost, lost.values())
                continue  # replaced meanwhile
            if isinstance(item, Exception):
                raise item
            done.append(item)
        self._out -= len(done)
        return done

    def abort(self, tickets: Collection[int]) -> list[Completion]:
        """Take requests back; returns what they have produced so far. Tickets that are not out are passed over.

        Raises:
            RunError: an engine does not give them back within a minute.
        """
        wanted = set(tickets)

        async def take_back() -> tuple[list[Completion], set[int]]:
            early = [r for r in self._waiting if r.ticket in wanted]
            self._waiting = deque(r for r in self._waiting if r.ticket not in wanted)
            out: set[int] = set()
            for seat in self._seats:
                running = [ticket for ticket in seat.running if ticket in wanted]
                out.update(running)
                if running and seat.failure is None:
                    await seat.client.abort(running, time_limit_s=STEER_S)
            return [PartialCompletion(r).completion("abort") for r in early], out

        taken, out = self.call(take_back())
        others: list[Completion | Exception | None] = []
        try:
            while out or not self._done.empty():
                item = self._done.get(timeout=STEER_S)
                if isinstance(item, Completion) and item.ticket in wanted:
                    taken.append(item)
                    out.discard(item.ticket)
                else:
                    others.append(item)
        except queue.Empty:
            raise RunError(f"rollout: {len(out)} aborted requests were not given back within {STEER_S:.0f} s") from None
        finally:
            self._put_back(others)
        self._out -= len(taken)
        return taken

    def pause(self) -> None:
        """Stop between two tokens; requests stay where they are."""
        self.everywhere(lambda client: client.post("/pause?mode=keep", time_limit_s=STEER_S))

    def resume(self) -> None:
        """Go on after `pause`; new engines, which have their weights by now, start to work."""
        self.everywhere(lambda client: client.post("/resume", time_limit_s=STEER_S))

        def open_all() -> None:
            for seat in self._seats:
                seat.open = True
            self._fill()

        self._loop.call_soon_threadsafe(open_all)

    def update_weights(self, version: int) -> None:
        """Tokens from now on belong to `version`; what was cached under the old weights is dropped.

        Sequences in flight keep their tokens; their keys and values are computed anew under the new weights. Without
        that vLLM would keep the whole prefix cache as long as one sequence is in flight.
        """

        async def finish(client: Client) -> None:
            await client.post("/update_weight_version", {"new_version": str(version)}, time_limit_s=STEER_S)
            path = "/reset_prefix_cache?reset_running_requests=true"
            answer = await client.post(path, time_limit_s=STEER_S)
            if not answer["success"]:
                raise EngineFailed(f"rollout: engine {client.address} keeps its prefix cache of the old weights")

        self.everywhere(finish)

    def sleep(self) -> None:
        """Give the GPU's memory away: weights and KV cache are dropped."""
        self.everywhere(lambda client: client.post("/sleep?level=2", time_limit_s=STEER_S))

    def wake(self, what: str) -> None:
        """Take memory back: first for "weights", which are then written, later for "kv_cache"."""
        self.everywhere(lambda client: client.post(f"/wake_up?tags={what}", time_limit_s=STEER_S))

    # engines

    def replace(self, engine: int, address: str) -> None:
        """Put a new engine in the place of a lost one; it gets requests after the next `resume`."""

        async def exchange() -> None:
            old = self._seats[engine]
            self._seats[engine] = _Seat(self._connect(address))
            await old.client.close()

        self.call(exchange())

    def everywhere(self, steer: Callable[[Client], Awaitable[Any]]) -> list[Any]:
        """Call all engines at once; returns their answers.

        Raises:
            EnginesLost: some failed; they count as dead from now on.
        """
        return self.call(self.at_each(steer))

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine in the fleet's loop without waiting: a concurrent.futures.Future."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Run a coroutine in the fleet's loop and wait. Its own calls carry the time limits."""
        return self.start(coroutine).result()

    def lost(self) -> dict[int, str]:
        """Index → reason of engines that have failed."""
        return {i: seat.failure for i, seat in enumerate(self._seats) if seat.failure is not None}

    def close(self) -> None:
        """Drop connections and end the loop."""

        async def finish() -> None:
            for task in self._tasks:
                task.cancel()
            for seat in self._seats:
                await seat.client.close()

        self._watch.cancel()
        self.call(finish())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STEER_S)

    async def at_each(self, steer: Callable[[Client], Awaitable[Any]]) -> list[Any]:
        """`everywhere` as a coroutine, for `start`."""
        seats = list(self._seats)  # a seat that is replaced meanwhile must not be blamed for the old one
        answers = await asyncio.gather(*(steer(seat.client) for seat in seats), return_exceptions=True)
        for seat, answer in zip(seats, answers, strict=True):
            if isinstance(answer, EngineFailed):
                self._lose(seat, str(answer))
            elif isinstance(answer, BaseException):
                raise answer
        if lost := self.lost():
            raise EnginesLost(lost, lost.values())
        return answers

    async def _look_after_all(self) -> None:
        """Find engines that take requests and are dead or frozen; a closed connection shows by itself."""
        while True:
            await asyncio.sleep(HEALTH_EVERY_S)
            seats = [seat for seat in self._seats if seat.open and seat.failure is None]
            found = await asyncio.gather(*(seat.client.healthy(time_limit_s=HEALTH_LIMIT_S) for seat in seats))
            for seat, well in zip(seats, found, strict=True):
                seat.misses = 0 if well else seat.misses + 1
                if seat.misses >= HEALTH_MISSES:
                    self._lose(seat, f"rollout: engine {seat.client.address} does not answer /health")

    def _fill(self) -> None:
        """Start waiting requests, each on the engine with the fewest running; inside the loop."""
        while self._waiting:
            seats = [s for s in self._seats if s.open and s.failure is None and len(s.running) < self._capacity]
            if not seats:
                return
            seat = min(seats, key=lambda s: len(s.running))
            request = self._waiting.popleft()
            seat.running[request.ticket] = request
            task = self._loop.create_task(self._draw(seat, request))
            self._tasks.add(task)  # the loop itself holds tasks weakly
            task.add_done_callback(self._tasks.discard)

    async def _draw(self, seat: _Seat, request: RolloutRequest) -> None:
        try:
            completion = await seat.client.generate(request, time_limit_s=self._time_limit_s)
        except EngineFailed as failure:
            seat.running.pop(request.ticket, None)
            self._waiting.appendleft(request)
            self._lose(seat, str(failure))
        except Exception as error:  # not the engine's: whoever collects is to see it
            seat.running.pop(request.ticket, None)
            self._done.put(error)
        else:
            seat.running.pop(request.ticket, None)
            self._done.put(completion)
        self._fill()

    def _lose(self, seat: _Seat, reason: str) -> None:
        if seat.failure is None:
            seat.failure = reason
            self._done.put(None)

    def _put_back(self, items: Sequence[Completion | Exception | None]) -> None:
        for item in items:
            self._done.put(item)
