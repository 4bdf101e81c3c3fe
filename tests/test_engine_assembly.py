"""Where engines listen and stand, decided before any starts."""

import pytest

from dapo_megatron.config.derive import engine_owner
from dapo_megatron.engine_assembly import reachable


@pytest.mark.parametrize(
    ("own", "known", "found"),
    [
        ("10.0.0.7", ["127.0.1.1", "10.0.0.5"], "10.0.0.7"),
        ("127.0.0.1", ["127.0.1.1", "127.0.1.1", "10.0.0.5", "10.0.0.5"], "10.0.0.5"),  # rank 0's own host
        ("127.0.0.1", ["127.0.0.1"], "127.0.0.1"),
    ],
)
def test_a_machine_that_knows_itself_by_a_loopback_address_takes_the_one_that_others_know(own, known, found):
    assert reachable(own, known) == found


@pytest.mark.parametrize("gpus", [2, 4, 8])
@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_engines_beside_the_learner_never_leave_a_node_whose_gpus_their_size_divides(gpus, nodes):
    world = gpus * nodes
    for tensor in (t for t in range(1, gpus + 1) if gpus % t == 0):
        for engines in range(1, world // tensor + 1):
            owners = [engine_owner(e, engines=engines, tensor=tensor, world=world) for e in range(engines)]
            devices = [rank for owner in owners for rank in range(owner, owner + tensor)]
            assert len(set(devices)) == len(devices) and max(devices) < world and owners[0] == 0
            assert all(owner // gpus == (owner + tensor - 1) // gpus for owner in owners)


def test_engines_with_devices_of_their_own_are_spread_over_all_ranks():
    assert [engine_owner(e, engines=4, tensor=4, world=2) for e in range(4)] == [0, 0, 1, 1]
