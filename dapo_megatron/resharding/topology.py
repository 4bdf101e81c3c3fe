"""Which processes of a weight transfer share a machine, and which a device.

Learner ranks are places 0, 1, …; workers follow, engine by engine. A worker stands where its home is: a learner rank.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from dapo_megatron.errors import RequestError


@dataclass(frozen=True)
class Topology:
    """machines: the machine of each learner rank, numbered; homes: for each worker the learner rank whose device it
    shares (on a CPU: whose machine)."""

    machines: tuple[int, ...]
    homes: tuple[int, ...]

    def home(self, place: int) -> int:
        """The learner rank at `place`, or the one on whose device the worker there stands."""
        return place if place < len(self.machines) else self.homes[place - len(self.machines)]

    def machine(self, place: int) -> int:
        """The machine of a learner rank or a worker."""
        return self.machines[self.home(place)]


def topology_of(names: Sequence[Hashable], owners: Sequence[int], *, tensor: int, devices: bool) -> Topology:
    """The topology of learner ranks on machines `names` (one a rank) and of engines of `tensor` workers.

    owners: the learner rank that starts each engine; its worker t stands on the device of rank owner + t. `devices`:
    whether there are such devices; without, workers stand on their owner's machine whatever their number.

    Raises:
        RequestError: more workers than devices, or an engine whose devices would lie on two machines; names the nearest
            rollout.engines or rollout.tensor that works.
    """
    if devices and len(owners) * tensor > len(names):
        raise RequestError(_too_many(len(owners), tensor, len(names)))
    numbers = {name: i for i, name in enumerate(dict.fromkeys(names))}
    machines = tuple(numbers[name] for name in names)
    homes: list[int] = []
    for engine, owner in enumerate(owners):
        own = [rank if rank < len(names) and machines[rank] == machines[owner] else None
               for rank in range(owner, owner + tensor)]  # fmt: skip
        if devices and None in own:
            raise RequestError(_across(engine, owner, machines, tensor))
        homes += [owner if rank is None else rank for rank in own]
    return Topology(machines, tuple(homes))


def _too_many(engines: int, tensor: int, devices: int) -> str:
    needs = f"need {engines * tensor} devices and the learner has {devices}"
    if devices < tensor:
        return f"rollout.engines={engines} of rollout.tensor={tensor} workers {needs}; use rollout.tensor={devices}"
    use = f"use rollout.engines={devices // tensor} or fewer"
    return f"rollout.engines={engines} of rollout.tensor={tensor} workers {needs}; {use}"


def _across(engine: int, owner: int, machines: Sequence[int], tensor: int) -> str:
    together = min(machines.count(machine) for machine in set(machines))  # ranks of the smallest machine
    nearest = max(n for n in range(1, min(tensor, together) + 1) if together % n == 0 and tensor % n == 0)
    return (
        f"rollout.tensor={tensor} puts engine {engine} on the devices of ranks {owner} to {owner + tensor - 1}, which "
        f"lie on several machines of {together} ranks; an engine must not leave its machine: use "
        f"rollout.tensor={nearest}"
    )
