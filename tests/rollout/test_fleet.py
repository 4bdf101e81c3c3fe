"""The queue in front of several engines, against engines that live in the test's own process."""

import asyncio
import heapq
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.data.completions import Completion
from dapo_megatron.errors import Interrupted, RunError
from dapo_megatron.rollout.engine import RolloutRequest
from dapo_megatron.rollout.fleet import EnginesLost, Fleet
from dapo_megatron.rollout.vllm_client import EngineFailed

LIMIT_S = 30.0
RESET = "/reset_prefix_cache?reset_running_requests=true"


class FakeEngine:
    """Takes `seconds(ticket)` for a completion whose only token is the ticket."""

    made: list["FakeEngine"]

    def __init__(self, address: str, seconds=lambda ticket: 0.0) -> None:
        self.address, self.seconds = address, seconds
        self.served: list[int] = []
        self.now = self.most = 0
        self.dies_at: int | None = None
        self.aborted: set[int] = set()
        self.posts: list[tuple[str, object]] = []
        self.closed, self.resets, self.well = False, True, True
        self.last_done = 0.0

    async def generate(self, request: RolloutRequest, *, time_limit_s: float) -> Completion:
        self.now += 1
        self.most = max(self.most, self.now)
        self.served.append(request.ticket)
        if self.dies_at is not None and len(self.served) > self.dies_at:
            raise EngineFailed(f"{self.address} is gone")
        until = time.monotonic() + self.seconds(request.ticket)
        while time.monotonic() < until and request.ticket not in self.aborted:
            await asyncio.sleep(0.001)
        self.now -= 1
        self.last_done = time.monotonic()
        reason = "abort" if request.ticket in self.aborted else "stop"
        tokens = np.array([request.ticket], np.int32)
        return Completion(request.ticket, tokens, np.zeros(1, np.float32), reason, np.zeros(1, np.int32))

    async def abort(self, tickets, *, time_limit_s: float) -> None:
        self.aborted |= set(tickets)

    async def post(self, path: str, body=None, *, time_limit_s: float):
        if self.dies_at == 0:
            raise EngineFailed(f"{self.address} is gone")
        self.posts.append((path, body))
        return {"success": self.resets} if path.startswith("/reset_prefix_cache") else None

    async def healthy(self, *, time_limit_s: float) -> bool:
        return self.well

    async def close(self) -> None:
        self.closed = True


def requests(count: int, first: int = 0) -> list[RolloutRequest]:
    return [RolloutRequest(first + i, np.arange(3), seed=i, max_new_tokens=4) for i in range(count)]


def make_fleet(engines: list[FakeEngine], *, capacity: int = 4, resumed: bool = True) -> Fleet:
    by_address = {engine.address: engine for engine in engines}
    fleet = Fleet(
        by_address.__getitem__, [engine.address for engine in engines], capacity=capacity, time_limit_s=LIMIT_S
    )
    if resumed:
        fleet.resume()
    return fleet


def tickets(completions) -> list[int]:
    return sorted(completion.ticket for completion in completions)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(0, 40), engines=st.integers(1, 4), capacity=st.integers(1, 9), seed=st.integers(0, 99))
def test_every_request_comes_back_once_and_no_engine_is_overfilled(count, engines, capacity, seed):
    waits = np.random.default_rng(seed).uniform(0, 0.004, 40)
    all_engines = [FakeEngine(f"e{i}", lambda t: waits[t]) for i in range(engines)]
    fleet = make_fleet(all_engines, capacity=capacity)
    assert fleet.submit(requests(count)) == list(range(count))
    assert tickets(fleet.collect(time_limit_s=LIMIT_S)) == list(range(count))
    assert max(engine.most for engine in all_engines) <= capacity
    assert sorted(t for engine in all_engines for t in engine.served) == list(range(count))
    fleet.close()


def test_the_least_loaded_engine_comes_first():
    slow, quick = FakeEngine("slow", lambda t: 0.3), FakeEngine("quick", lambda t: 0.0)
    fleet = make_fleet([slow, quick], capacity=2)
    fleet.submit(requests(20))
    fleet.collect(time_limit_s=LIMIT_S)
    assert len(quick.served) > 3 * len(slow.served)
    fleet.close()


def test_a_request_to_stop_ends_the_wait_and_loses_nothing():
    slow, begun = FakeEngine("e", lambda t: 0.0 if t < 3 else 4.0), time.monotonic()
    fleet = make_fleet([slow], capacity=8)
    fleet.submit(requests(4))
    with pytest.raises(Interrupted):
        fleet.collect(time_limit_s=LIMIT_S, stopping=lambda: time.monotonic() > begun + 0.5)
    assert time.monotonic() < begun + 3.5
    assert tickets(fleet.collect(time_limit_s=LIMIT_S)) == [0, 1, 2, 3]
    fleet.close()


def test_collect_until_leaves_the_rest_for_later():
    fleet = make_fleet([FakeEngine("e", lambda t: 0.002 * t)], capacity=8)
    fleet.submit(requests(8))
    first = fleet.collect(3, time_limit_s=LIMIT_S)
    rest = fleet.collect(time_limit_s=LIMIT_S)
    assert len(first) >= 3 and tickets([*first, *rest]) == list(range(8))
    assert fleet.collect(time_limit_s=LIMIT_S) == []
    fleet.close()


def test_a_dead_engine_is_named_and_its_requests_are_drawn_by_its_successor():
    dying, well = FakeEngine("dying"), FakeEngine("well", lambda t: 0.01)
    dying.dies_at = 1
    successor = FakeEngine("successor")
    engines = {engine.address: engine for engine in (dying, well, successor)}
    fleet = Fleet(engines.__getitem__, ["dying", "well"], capacity=2, time_limit_s=LIMIT_S)
    fleet.resume()
    fleet.submit(requests(12))
    with pytest.raises(EnginesLost, match="dying is gone") as lost:
        fleet.collect(time_limit_s=LIMIT_S)
    assert lost.value.engines == [0] and lost.value.on_every_rank
    fleet.replace(0, "successor")
    assert dying.closed and successor.served == []  # it has no weights yet
    fleet.resume()
    assert tickets(fleet.collect(time_limit_s=LIMIT_S)) == list(range(12))
    fleet.submit(requests(6, first=100))
    assert tickets(fleet.collect(time_limit_s=LIMIT_S)) == list(range(100, 106))
    assert successor.served
    fleet.close()


def test_an_engine_that_ends_with_the_run_is_not_called_lost():
    """A signal may reach both."""
    dying, begun = FakeEngine("dying"), []
    dying.dies_at = 1
    fleet = make_fleet([dying], capacity=2)
    fleet.submit(requests(4))

    def stopping() -> bool:
        begun.append(dying.served)
        return len(begun) > 1

    with pytest.raises(Interrupted):
        fleet.collect(time_limit_s=LIMIT_S, stopping=stopping)
    fleet.close()


def test_an_only_engine_that_dies_loses_no_request():
    dying, successor = FakeEngine("dying"), FakeEngine("successor")
    dying.dies_at = 3
    engines = {"dying": dying, "successor": successor}
    fleet = Fleet(engines.__getitem__, ["dying"], capacity=4, time_limit_s=LIMIT_S)
    fleet.resume()
    fleet.submit(requests(9))
    with pytest.raises(EnginesLost):
        fleet.collect(time_limit_s=LIMIT_S)
    fleet.replace(0, "successor")
    fleet.resume()
    assert tickets(fleet.collect(time_limit_s=LIMIT_S)) == list(range(9))
    fleet.close()


def test_engines_get_no_requests_before_the_first_resume():
    engine = FakeEngine("e")
    fleet = make_fleet([engine], resumed=False)
    fleet.submit(requests(3))
    with pytest.raises(RunError, match=r"3 requests unfinished after rollout\.time_limit_s"):
        fleet.collect(time_limit_s=0.1)
    assert engine.served == []
    fleet.resume()
    assert tickets(fleet.collect(time_limit_s=LIMIT_S)) == [0, 1, 2]
    fleet.close()


def test_a_refused_request_is_told_and_not_taken_for_a_dead_engine():
    class Refuses(FakeEngine):
        async def generate(self, request, *, time_limit_s):
            raise RunError("answered with 400: prompt too long")

    fleet = make_fleet([Refuses("e")])
    fleet.submit(requests(1))
    with pytest.raises(RunError, match="prompt too long"):
        fleet.collect(time_limit_s=LIMIT_S)
    assert fleet.lost() == {}
    fleet.close()


def test_abort_takes_back_waiting_and_running_requests():
    engine = FakeEngine("e", lambda t: 60.0 if t < 3 else 0.0)
    fleet = make_fleet([engine], capacity=2)
    fleet.submit(requests(5))
    while len(engine.served) < 2:
        time.sleep(0.005)
    taken = fleet.abort([0, 1, 2])
    assert tickets(taken) == [0, 1, 2] and {c.finish_reason for c in taken} == {"abort"}
    assert sorted(len(c.tokens) for c in taken) == [0, 1, 1]
    assert tickets(fleet.collect(time_limit_s=LIMIT_S)) == [3, 4]
    fleet.close()


def test_abort_passes_over_what_is_not_out():
    fleet = make_fleet([FakeEngine("e")])
    fleet.submit(requests(2))
    assert tickets(fleet.collect(time_limit_s=LIMIT_S)) == [0, 1]
    assert fleet.abort([0, 99]) == []
    fleet.close()


def test_a_frozen_engine_is_found(monkeypatch):
    monkeypatch.setattr("dapo_megatron.rollout.fleet.HEALTH_EVERY_S", 0.02)
    frozen, well = FakeEngine("frozen", lambda t: 600.0), FakeEngine("well")
    fleet = make_fleet([frozen, well], capacity=1)
    fleet.submit(requests(6))
    while len(well.served) < 5:
        time.sleep(0.005)
    frozen.well = False
    with pytest.raises(EnginesLost, match=r"frozen does not answer /health") as lost:
        fleet.collect(time_limit_s=LIMIT_S)
    assert lost.value.engines == [0]
    fleet.close()


def test_steering_reaches_all_engines_and_a_dead_one_is_named():
    engines = [FakeEngine("a"), FakeEngine("b")]
    fleet = make_fleet(engines)
    fleet.pause()
    fleet.update_weights(7)
    for engine in engines:
        paths = [path for path, _ in engine.posts]
        assert paths == ["/resume", "/pause?mode=keep", "/update_weight_version", RESET]
        assert engine.posts[2][1] == {"new_version": "7"}
    engines[1].dies_at = 0
    with pytest.raises(EnginesLost, match="b is gone") as lost:
        fleet.resume()
    assert lost.value.engines == [1] and list(fleet.lost()) == [1]
    fleet.close()


def test_an_engine_that_keeps_its_old_prefix_cache_is_not_used():
    engine = FakeEngine("e")
    fleet = make_fleet([engine])
    engine.resets = False
    with pytest.raises(EnginesLost, match="keeps its prefix cache"):
        fleet.update_weights(1)
    fleet.close()


def idle_share(finish: list[float]) -> float:
    return (max(finish) - min(finish)) / max(finish)


class SimulatedEngine(FakeEngine):
    """Finishes requests in the order of a clock that jumps from end to end, so that no time passes."""

    def __init__(self, address: str, seconds, clock: "Clock") -> None:
        super().__init__(address, seconds)
        self.clock = clock

    async def generate(self, request: RolloutRequest, *, time_limit_s: float) -> Completion:
        await self.clock.wait(self.seconds(request.ticket))
        self.last_done = self.clock.now
        tokens = np.array([request.ticket], np.int32)
        return Completion(request.ticket, tokens, np.zeros(1, np.float32), "stop", np.zeros(1, np.int32))


class Clock:
    """Simulated seconds, shared by all that wait in one event loop."""

    def __init__(self) -> None:
        self.now, self.driver = 0.0, None
        self.ends: list[tuple[float, int, asyncio.Future]] = []

    async def wait(self, seconds: float) -> None:
        done = asyncio.get_running_loop().create_future()
        heapq.heappush(self.ends, (self.now + seconds, id(done), done))
        if self.driver is None or self.driver.done():
            self.driver = asyncio.create_task(self.run())
        await done

    async def run(self) -> None:
        while self.ends:
            for _ in range(10):  # what the last end has set off comes first
                await asyncio.sleep(0)
            self.now, _, done = heapq.heappop(self.ends)
            done.set_result(None)
            await asyncio.sleep(0)


def test_two_engines_finish_nearly_together():
    """Log-normal lengths, as responses have them: the earlier engine idles less than 15 % of the phase."""
    shared, static = [], []
    for seed in range(3):
        seconds = np.minimum(np.random.default_rng(seed).lognormal(0.0, 1.0, 256), 12.0)
        clock = Clock()
        engines = [SimulatedEngine(f"e{i}", lambda t, s=seconds: s[t], clock) for i in range(2)]
        fleet = make_fleet(engines, capacity=8)
        fleet.submit(requests(256))
        fleet.collect(time_limit_s=LIMIT_S)
        shared.append(idle_share([engine.last_done for engine in engines]))
        fleet.close()
        static.append(idle_share([float(makespan(seconds[i::2])) for i in range(2)]))
    print(f"idle share of the earlier engine: shared queue {np.mean(shared):.3f}, static split {np.mean(static):.3f}")
    assert max(shared) < 0.15


def makespan(seconds: np.ndarray, capacity: int = 8) -> float:
    """When the last of these is done, on an engine that works on `capacity` at once."""
    ends = np.zeros(capacity)
    for duration in seconds:
        ends[ends.argmin()] += duration
    return ends.max()
