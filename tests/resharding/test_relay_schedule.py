"""The rounds of weights between machines: what crosses, how often, and that nobody waits in a circle."""

import random
from collections import Counter
from collections.abc import Generator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dapo_megatron.errors import RequestError
from dapo_megatron.resharding.megatron_layout import megatron_layout
from dapo_megatron.resharding.messages import COALESCE_BELOW
from dapo_megatron.resharding.plan import Plan, make_plan
from dapo_megatron.resharding.relay_schedule import SLOTS, Content, Parcel, Round, fitted, relay_rounds, slot_elements
from dapo_megatron.resharding.relay_taker import visits_of
from dapo_megatron.resharding.topology import Topology, topology_of
from dapo_megatron.resharding.vllm_layout import vllm_layout, vllm_local_shapes
from tests.resharding.worlds import (
    PADDING,
    architectures,
    box,
    carry_out,
    layouts,
    numbered,
    shards,
    vllm_sizes,
    vllm_worker,
)  # fmt: skip

ITEMSIZE = 4
MODELS = architectures().flatmap(lambda a: st.tuples(st.just(a), layouts(a)))


@given(MODELS, st.data())
@settings(deadline=None, max_examples=20)
def test_every_element_crosses_once_a_machine_and_arrives_in_any_order_of_events(model, data):
    a, layout = model
    tensor = data.draw(st.sampled_from(vllm_sizes(a)))
    names = data.draw(st.lists(st.integers(0, 2), min_size=layout.world, max_size=layout.world))
    owners = data.draw(st.lists(st.integers(0, layout.world - 1), min_size=1, max_size=3))
    topology = topology_of(names, owners, tensor=tensor, devices=False)
    bucket, window = data.draw(st.sampled_from([600, 3000, 1 << 20])), data.draw(st.sampled_from([1, 3, 256]))
    target = vllm_layout(a, engines=len(owners), tensor=tensor, first_rank=layout.world)
    plan = make_plan(megatron_layout(a, layout), target, topology)
    small = data.draw(st.sampled_from([0, COALESCE_BELOW]))
    rounds = relay_rounds(
        plan, topology, itemsize=ITEMSIZE, bucket_bytes=bucket, most_operations=window, small_bytes=small
    )
    whole = numbered(a)
    held = shards(a, layout, whole)
    shapes = vllm_local_shapes(a, tensor)
    got = {place: {key: torch.full(shape, PADDING) for key, shape in shapes.items()} for place in target.placements}
    near = tuple(m for m in plan.moves if topology.machine(m.source_rank) == topology.machine(m.target_rank))
    carry_out(Plan(near), held, got)
    Events(rounds, topology, held, got, bucket, data.draw(st.randoms(use_true_random=False))).run()
    for place in got:
        worker = (place - layout.world) % tensor
        for key, expected in vllm_worker(a, whole, tensor, worker).items():
            assert torch.equal(got[place][key], expected), (place, key)
    for parcel in (parcel for parcels in rounds for parcel in parcels if len(parcel.pieces) > 1):
        assert {topology.home(place) for place in parcel.takers} == {parcel.relay}
    crossed: Counter[int] = Counter()
    for parcel in (parcel for parcels in rounds for parcel in parcels):
        assert topology.machine(parcel.giver) != topology.machine(parcel.relay)
        assert {topology.machine(place) for place in parcel.takers} == {topology.machine(parcel.relay)}
        crossed[topology.machine(parcel.relay)] += parcel.elements
    for machine in set(topology.machines):
        wanted = [t.flatten() for place in got if topology.machine(place) == machine for t in got[place].values()]
        beside = [t.flatten() for rank in held if topology.machine(rank) == machine for t in held[rank].values()]
        lacking = torch.cat(wanted).unique() if wanted else torch.zeros(0, dtype=torch.int64)
        lacking = lacking[~torch.isin(lacking, torch.cat(beside)) & (lacking != PADDING)]
        # neighbours that hold the same kv head may want it in runs that are cut differently
        alike = tensor <= a.kv_heads and not small  # what is small comes to each home
        assert crossed[machine] == len(lacking) if alike else crossed[machine] >= len(lacking)


class Events:
    """Ranks and workers as they take turns, one step of one of them at a time, in a random order."""

    def __init__(
        self, rounds: tuple[Round, ...], topology: Topology, held: dict[int, dict[str, Tensor]],
        got: dict[int, dict[str, Tensor]], bucket: int, order: random.Random,
    ) -> None:  # fmt: skip
        self.rounds, self.topology, self.held, self.got, self.order = rounds, topology, held, got, order
        self.slot = slot_elements(bucket, ITEMSIZE)
        self.staging = {rank: torch.full((SLOTS, self.slot), PADDING) for rank in held}
        self.posted: set[tuple[int, int]] = set()  # (rank, round)
        self.full: set[tuple[int, int]] = set()
        self.taken: set[tuple[int, int, int]] = set()  # (worker, relay, round)
        for k, parcels in enumerate(rounds):
            sent, received = Counter(), Counter()
            for p in parcels:
                assert p.offset == received[p.relay] and p.elements == sum(piece[0].elements for piece in p.pieces)
                sent[p.giver] += p.elements
                received[p.relay] += p.elements
            assert max([*sent.values(), *received.values()]) <= self.slot, k

    def run(self) -> None:
        programs: list[Generator[None, None, None]] = [self._rank(rank) for rank in self.held]
        programs += [self._worker(place, relay) for place in self.got for relay in visits_of(self.rounds, place)]
        idle = 0
        while programs:
            assert idle < 2000, "nobody moves"
            program = self.order.choice(programs)
            before = len(self.posted), len(self.full), len(self.taken)
            try:
                next(program)
                idle = idle + 1 if before == (len(self.posted), len(self.full), len(self.taken)) else 0
            except StopIteration:
                programs.remove(program)

    def _rank(self, rank: int) -> Generator[None, None, None]:
        for k, parcels in enumerate(self.rounds):
            takers = {w for p in self.rounds[k - SLOTS] if p.relay == rank for w in p.takers} if k >= SLOTS else set()
            while not all((w, rank, k - SLOTS) in self.taken for w in takers):
                yield
            self.posted.add((rank, k))
            yield
            mine = [p for p in parcels if rank in (p.giver, p.relay)]
            for p in mine:  # bytes flow as soon as both ends are posted
                while not {(p.giver, k), (p.relay, k)} <= self.posted:
                    yield
                if p.relay == rank:
                    parts = [box(self.held[p.giver][m.source_key], m.source_offset, m.shape).flatten()
                             for m, *_ in p.pieces]  # fmt: skip
                    self.staging[rank][k % SLOTS, p.offset : p.offset + p.elements] = torch.cat(parts)
            self.full.add((rank, k))
            yield

    def _worker(self, place: int, relay: int) -> Generator[None, None, None]:
        """What a worker takes of one relay: of which first, is open."""
        for k, parcels in visits_of(self.rounds, place)[relay]:
            while (relay, k) not in self.full:
                yield
            for p in parcels:
                first = p.offset
                for piece in p.pieces:
                    for m in piece:
                        if m.target_rank == place:
                            part = self.staging[relay][k % SLOTS, first : first + m.elements].view(m.shape)
                            box(self.got[place][m.target_key], m.target_offset, m.shape).copy_(part)
                    first += piece[0].elements
                yield
            self.taken.add((place, relay, k))


ENDS = st.tuples(st.integers(0, 2), st.integers(3, 5))  # giver, relay
CONTENTS = st.lists(st.builds(lambda ends, size: (*ends, (), size), ENDS, st.integers(1, 130)), max_size=60)


@given(CONTENTS, st.sampled_from([1, 2, 5, 256]))
@settings(deadline=None)
def test_parcels_go_into_the_first_rounds_with_room(contents, window):
    assert fitted(contents, 100, window) == first_fit(contents, 100, window)


def test_many_rounds_and_sizes():
    order = random.Random(3)
    contents = [(order.randrange(3), order.randrange(3, 6), (), order.choice([7, 23, 24, 25, 99])) for _ in range(1500)]
    found = fitted(contents, 100, 9)
    assert found == first_fit(contents, 100, 9) and len(found) > 128


def first_fit(contents: list[Content], slot: int, window: int) -> tuple[Round, ...]:
    """By looking at every round from the first that is not 15 / 16 full."""
    rounds: list[list[Parcel]] = []

    def held(k: int, end: str, rank: int) -> int:
        return sum(p.elements for p in rounds[k] if getattr(p, end) == rank) if k < len(rounds) else 0

    for giver, relay, pieces, size in contents:
        ends = [("giver", giver), ("relay", relay)]
        begins = []
        for end in ends:
            full = 0
            while held(full, *end) * 16 > slot * 15:
                full += 1
            begins.append(full)
        k = max(begins)
        while k < len(rounds):
            posted = [sum(rank in (p.giver, p.relay) for p in rounds[k]) for rank in (giver, relay)]
            room = all(not held(k, *end) or held(k, *end) + size <= slot for end in ends)
            if room and max(posted) < window:
                break
            k += 1
        offset = held(k, "relay", relay)
        rounds += [[] for _ in range(k + 1 - len(rounds))]
        rounds[k].append(Parcel(giver, relay, pieces, size, offset))
    return tuple(map(tuple, rounds))


def test_a_worker_stands_on_its_owners_device_and_the_next_ones():
    topology = topology_of(["b", "b", "a", "a"], [0, 2], tensor=2, devices=True)
    assert topology == Topology(machines=(0, 0, 1, 1), homes=(0, 1, 2, 3))
    assert [topology.machine(place) for place in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
    without = topology_of(["a", "b"], [0, 1], tensor=2, devices=False)
    assert without.homes == (0, 0, 1, 1)  # rank 1 is elsewhere, and there is no rank 2


@pytest.mark.parametrize(
    ("names", "owners", "tensor", "told"),
    [
        ("aabb", [0], 4, r"rollout\.tensor=4 puts engine 0 on .* ranks 0 to 3, .* several machines of 2 .*tensor=2$"),
        ("aabb", [1], 2, r"engine 0 on the devices of ranks 1 to 2, .*rollout\.tensor=2$"),
        ("aa", [0, 1], 2, r"rollout\.engines=2 of .* need 4 devices .* has 2; use rollout\.engines=1 or fewer$"),
        ("aabb", [0], 5, r"need 5 devices .* has 4; use rollout\.tensor=4$"),
        ("aaaa", [0, 1, 2], 2, r"rollout\.engines=3 of rollout\.tensor=2 .* need 6 devices .* has 4; use .*engines=2"),
    ],
)
def test_engines_that_leave_their_machine_or_share_a_device_are_refused(names, owners, tensor, told):
    with pytest.raises(RequestError, match=told):
        topology_of(list(names), owners, tensor=tensor, devices=True)
