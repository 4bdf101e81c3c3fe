"""Counts what passes through collectives: weights must not."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

POINT_TO_POINT = ("send", "recv_", "recv_any_source_")


class Collectives(TorchDispatchMode):
    """Bytes of the tensors handed to torch.distributed inside, by operation: of all but sends and receives in
    `bytes`, of these in `sent`."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            name = function._schema.name.removeprefix("c10d::")
            tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            (self.sent if name in POINT_TO_POINT else self.bytes)[name] += sum(t.nbytes for t in tensors)
        return function(*args, **(kwargs or {}))
