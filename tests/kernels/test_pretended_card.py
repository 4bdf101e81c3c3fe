"""What the ops ask of a card, on a pretended one: tensors on "meta", the launches of the row kernels left out. So are
seen waits (a meta tensor has no values to wait for; a copy from the host waits as well) and the memory of everything
that torch allocates."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from dapo_kernels import (
    clipped_policy_loss,
    linear_clipped_policy_loss,
    linear_logprobs_and_entropy,
    logprobs_and_entropy,
)
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")
CARD = torch.device("meta")
OPTIONS = {"eps_low": 0.2, "eps_high": 0.28, "eps_dual": 10.0, "denominator": 7.0, "entropy_coefficient": 0.02}


class Card(TorchDispatchMode):
    """`waits`: copies between host and card; `peak`: the most bytes at once that were allocated inside this mode."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.peak = 0
        self._before: set[int] = set()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        before = [x for x in tree_leaves((arguments, options)) if isinstance(x, torch.Tensor)]
        self._before |= {x.untyped_storage()._cdata for x in before} - self._alive.keys()
        result = operation(*arguments, **(options or {}))
        after = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        if operation.overloadpacket.__name__ in ("_to_copy", "copy_"):
            self.waits += [str(operation)] * (len({x.device.type for x in (*before, *after)}) > 1)
        for x in after:
            storage = x.untyped_storage()
            if x.device == CARD and storage._cdata not in self._before:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


@pytest.fixture
def pretended(monkeypatch):
    """Meta tensors are taken for a card's; gives the mode to enter."""
    from dapo_kernels import triton_rows

    if triton_rows.INTERPRETED:
        pytest.skip("the interpreter takes no tensors without values")
    for name in ("logprobs", "policy_loss", "linear_chunks"):
        module = import_module(f"dapo_kernels.{name}")
        monkeypatch.setattr(module, "choose_implementation", lambda *_: "triton")
    monkeypatch.setattr(triton_rows, "_launch", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))

    @contextmanager
    def enter() -> Iterator[Card]:
        with Card() as card, monkeypatch.context() as patch:
            for name in ("as_tensor", "tensor"):  # numbers that Python brings; meta tensors swallow them unseen
                make = getattr(torch, name)
                patch.setattr(torch, name, lambda *a, make=make, **o: card.waits.append(make.__name__) or make(*a, **o))
            yield card

    return enter


def row_vectors(rows: int) -> list[torch.Tensor]:
    """targets, old log-probs, advantages, weights."""
    return [torch.zeros(rows, dtype=torch.int64, device=CARD), *torch.ones(3, rows, device=CARD).unbind()]


def head(rows: int, columns: int, width: int, main_grad: bool) -> tuple[torch.Tensor, torch.nn.Parameter]:
    hidden = torch.empty(rows, width, device=CARD, dtype=torch.bfloat16).requires_grad_()
    weight = torch.nn.Parameter(torch.empty(columns, width, device=CARD, dtype=torch.bfloat16))
    if main_grad:
        weight.main_grad = torch.empty(columns, width, device=CARD)
    return hidden, weight


def test_a_wait_would_be_seen(pretended):
    with pretended() as card:
        x = torch.ones(4, device=CARD)
        torch.where(x > 0, x, float("nan")), torch.full((), 2.0, device=CARD), x.sum() == 3
        assert not card.waits
        torch.as_tensor(2.0, device=CARD), torch.ones(3).to(CARD)
        assert card.waits == ["as_tensor", "aten._to_copy.default"]
        with pytest.raises(RuntimeError):
            x.sum().item()
        with pytest.raises((RuntimeError, NotImplementedError)):
            x[x > 0]


@pytest.mark.parametrize("temperature", [0.7, "a row"])
def test_the_materialised_ops_neither_wait_nor_copy_the_logits(pretended, temperature):
    rows, columns = 2048, 19008
    logits = torch.empty(rows, columns, device=CARD, dtype=torch.bfloat16).requires_grad_()
    targets, *vectors = row_vectors(rows)
    temperature = torch.ones(rows, device=CARD) if temperature == "a row" else temperature
    with pretended() as card:
        loss = clipped_policy_loss(logits, targets, *vectors, temperature=temperature, **OPTIONS).loss
        torch.autograd.grad(loss, logits)
        scores = logprobs_and_entropy(logits, targets, temperature=temperature, row_mask=vectors[-1] > 0)
        torch.autograd.grad(scores.logprobs.sum() + scores.entropy.sum(), logits)
    assert not card.waits
    assert 0 < card.peak < logits.numel() * 2 / 16


@pytest.mark.parametrize("main_grad", [True, False])
@pytest.mark.parametrize("kept", [300, 200])
def test_the_linear_ops_wait_for_nothing_where_their_rows_are_known(pretended, kept, main_grad):
    hidden, weight = head(300, 1032, 256, main_grad)
    targets, *vectors = row_vectors(300)
    rows = torch.zeros(kept, dtype=torch.int64, device=CARD)
    leaves = [hidden] if main_grad else [hidden, weight]
    with pretended() as card:
        loss = linear_clipped_policy_loss(hidden, weight, targets, *vectors, rows=rows, chunk_rows=128, **OPTIONS).loss
        torch.autograd.grad(loss, leaves)
        scores = linear_logprobs_and_entropy(hidden, weight, targets, rows=rows, chunk_rows=128)
        torch.autograd.grad(scores.logprobs.sum() + scores.entropy.sum(), leaves)
    assert not card.waits


@pytest.mark.parametrize("kept", [16384, 11000])
def test_the_linear_loss_needs_a_chunk_and_the_gradient_of_the_states(pretended, kept):
    """16,384 rows of 19,008 columns, 5,120 wide: at most 0.25 GiB beyond what it is given."""
    hidden, weight = head(16384, 19008, 5120, True)
    targets, *vectors = row_vectors(16384)
    rows = torch.zeros(kept, dtype=torch.int64, device=CARD)
    with pretended() as card:
        loss = linear_clipped_policy_loss(hidden, weight, targets, *vectors, rows=rows, **OPTIONS).loss
        torch.autograd.grad(loss, hidden)
    chunk, gradient = 2048 * 19008 * 2, 16384 * 5120 * 2
    assert chunk + gradient < card.peak <= 2**28
