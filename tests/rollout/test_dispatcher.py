import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron import agreement
from dapo_megatron.data.completions import Completion
from dapo_megatron.rollout.dispatcher import Dispatcher
from dapo_megatron.rollout.engine import RolloutRequest


class EchoEngine:
    """Answers request t with tokens t, t + 1, … (as many as t mod 4), last request first."""

    def __init__(self) -> None:
        self.queue: list[RolloutRequest] = []
        self.seen: list[int] = []
        self.time_limits: list[float] = []

    def submit(self, requests):
        self.queue.extend(requests)
        self.seen.extend(r.ticket for r in requests)
        return [r.ticket for r in requests]

    def collect(self, until=None, *, time_limit_s):
        self.time_limits.append(time_limit_s)
        queue, self.queue = self.queue, []
        return [echo(r.ticket) for r in reversed(queue)]


def echo(ticket: int) -> Completion:
    size = ticket % 4
    return Completion(
        ticket,
        np.arange(ticket, ticket + size, dtype=np.int32),
        -np.arange(size, dtype=np.float32) - ticket,
        ("stop", "length", "abort")[ticket % 3],
        np.full(size, ticket % 5, dtype=np.int32),
    )


def in_threads(requests: list[RolloutRequest], engines: int, group: int, rounds: int = 1):
    """One Dispatcher a thread, an all-gather between them; (engines, the last round's completions by rank)."""
    barrier = threading.Barrier(engines, timeout=30)
    slots: list = [None] * engines
    rank_of = threading.local()

    def all_gather_object(into: list, mine: object) -> None:
        slots[rank_of.value] = mine
        barrier.wait()
        into[:] = slots
        barrier.wait()

    everyone = [EchoEngine() for _ in range(engines)]
    answers: list = [None] * engines

    def work(rank: int) -> None:
        rank_of.value = rank
        queue = Dispatcher(everyone[rank], rank=rank, world=engines, time_limit_s=17.0)
        for _ in range(rounds):
            answers[rank] = queue.generate(requests, group=group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "dist", SimpleNamespace(all_gather_object=all_gather_object))
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(engines)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    return everyone, answers


def same(a: Completion, b: Completion) -> bool:
    arrays = all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "logprobs", "policy_versions")
    )
    return (a.ticket, a.finish_reason) == (b.ticket, b.finish_reason) and arrays


SIZES = st.lists(st.tuples(st.integers(1, 50), st.integers(1, 200)), max_size=24)


@given(SIZES, st.integers(1, 4), st.integers(1, 5))
@settings(deadline=None, max_examples=80)
def test_order_groups_and_balance(sizes, engines, group):
    tickets = np.random.default_rng(len(sizes)).permutation(1000)[: len(sizes)]
    requests = [
        RolloutRequest(int(t), np.zeros(prompt, np.int32), 0, new)
        for t, (prompt, new) in zip(tickets, sizes, strict=True)
    ]
    everyone, answers = in_threads(requests, engines, group)
    for answer in answers:  # every rank learns of all completions, in the order of the requests
        assert [c.ticket for c in answer] == [r.ticket for r in requests]
        assert all(same(c, echo(c.ticket)) for c in answer)
    assert sorted(t for e in everyone for t in e.seen) == sorted(r.ticket for r in requests)
    owner = {t: rank for rank, e in enumerate(everyone) for t in e.seen}
    together = [requests[i : i + group] for i in range(0, len(requests), group)]
    assert all(len({owner[r.ticket] for r in members}) == 1 for members in together)
    cost = {r.ticket: len(r.prompt_tokens) + r.max_new_tokens for r in requests}
    loads = [sum(cost[t] for t in e.seen) for e in everyone]
    # each group went to the engine that was least loaded: no two differ by more than one group
    assert max(loads) - min(loads) <= max((sum(cost[r.ticket] for r in members) for members in together), default=0)
    assert all(e.time_limits == [17.0] for e in everyone)


def test_equal_requests_are_dealt_evenly_every_time():
    requests = [RolloutRequest(i, np.zeros(3, np.int32), 0, 5) for i in range(12)]
    everyone, answers = in_threads(requests, 3, 2, rounds=2)
    assert [len(e.seen) for e in everyone] == [8, 8, 8]  # two rounds of two groups of two
    assert all([c.ticket for c in answer] == list(range(12)) for answer in answers)
