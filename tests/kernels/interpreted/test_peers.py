"""The peers of the benchmark compute what we compute: loss and gradients on the same inputs. Liger's own where it is
installed, elsewhere a stand-in of it."""

import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from dapo_kernels import clipped_policy_loss, linear_clipped_policy_loss

sys.path.append(str(Path(__file__).parents[3] / "kernels" / "benchmarks"))
import peers

if find_spec("liger_kernel") is None:
    sys.path.append(str(Path(__file__).parents[1] / "stand_ins"))
SEQUENCES, LENGTH, COLUMNS, WIDTH = 3, 7, 72, 16
ROWS = SEQUENCES * LENGTH
CLOSE = {"rtol": 1e-4, "atol": 1e-6}


@pytest.fixture
def batch():
    """hidden, weight, (targets, old, advantages, weights): some rows masked, and some beyond each edge of the clip
    range, the dual one included."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(ROWS, WIDTH, generator=generator)
    weight = torch.randn(COLUMNS, WIDTH, generator=generator) / 2
    targets = torch.randint(0, COLUMNS, (ROWS,), generator=generator)
    true = torch.log_softmax(hidden @ weight.t(), 1).gather(1, targets[:, None]).squeeze(1)
    old = true + torch.tensor([0.0, 0.1, -0.1, 0.5, -0.5, -3.0, 0.05]).repeat(SEQUENCES)
    advantages = torch.tensor([1.3, -0.7, -1.1]).repeat_interleave(LENGTH)
    weights = (torch.rand(ROWS, generator=generator) > 0.25).float()
    ours = clipped_policy_loss(
        hidden @ weight.t(), targets, old, advantages, weights, denominator=float(weights.sum()), **peers.CLIP
    )
    assert ours.clipped_low.any() and ours.clipped_high.any() and ours.clipped_dual.any() and (weights == 0).any()
    return hidden, weight, (targets, old, advantages, weights)


def ours_on_logits(batch):
    hidden, weight, vectors = batch
    leaf = (hidden @ weight.t()).requires_grad_()
    total = float(vectors[3].sum())
    loss = clipped_policy_loss(leaf, *vectors, denominator=total, in_place=False, **peers.CLIP).loss
    return leaf, loss, *torch.autograd.grad(loss, leaf)


def test_plain_torch(batch):
    leaf, loss, gradient = ours_on_logits(batch)
    found = peers.plain_loss(leaf, *batch[2], float(batch[2][3].sum()))
    torch.testing.assert_close(found, loss, **CLOSE)
    torch.testing.assert_close(*torch.autograd.grad(found, leaf), gradient, **CLOSE)


def test_compiled_torch(batch, monkeypatch):
    """As a GPU has it, but for the code that the compiler would write last; for several N, and for another V."""
    monkeypatch.setattr(peers.torch, "compile", partial(torch.compile, backend="aot_eager"))
    leaf, loss, gradient = ours_on_logits(batch)
    total = float(batch[2][3].sum())
    compiled = peers.torch_losses(torch.device("cuda"), COLUMNS)["torch.compile"]
    assert compiled is peers.torch_losses(torch.device("cuda"), COLUMNS)["torch.compile"] is not peers.plain_loss
    found = compiled(leaf, *batch[2], total)
    torch.testing.assert_close(found, loss, **CLOSE)
    torch.testing.assert_close(*torch.autograd.grad(found, leaf), gradient, **CLOSE)
    fewer = [vector[:9] for vector in batch[2]]
    torch.testing.assert_close(compiled(leaf[:9], *fewer, total), peers.plain_loss(leaf[:9], *fewer, total), **CLOSE)
    assert peers.torch_losses(torch.device("cuda"), COLUMNS + 1)["torch.compile"] is not compiled
    assert set(peers.torch_losses(torch.device("cpu"), COLUMNS)) == {"torch eager"}


def test_liger_on_logits(batch):
    leaf, loss, gradient = ours_on_logits(batch)
    whole = torch.full((SEQUENCES, LENGTH + 1, COLUMNS), 5.0)
    whole[:, :-1] = leaf.detach().view(SEQUENCES, LENGTH, COLUMNS)
    whole.requires_grad_()
    found = peers.liger_loss(whole, *batch[2])
    torch.testing.assert_close(found, loss, **CLOSE)
    (theirs,) = torch.autograd.grad(found, whole)
    torch.testing.assert_close(theirs[:, :-1].reshape(ROWS, COLUMNS), gradient, **CLOSE)


@pytest.mark.parametrize("chunk", [1, 2])
def test_liger_on_hidden_states(batch, chunk):
    hidden, weight, vectors = batch
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    total = float(vectors[3].sum())
    loss = linear_clipped_policy_loss(*leaves, *vectors, denominator=total, **peers.CLIP).loss
    gradients = torch.autograd.grad(loss, leaves)
    found = peers.liger_linear_loss(chunk, compiled=False)(*leaves, *vectors, SEQUENCES)
    torch.testing.assert_close(found, loss, **CLOSE)
    for left, right in zip(torch.autograd.grad(found, leaves), gradients, strict=True):
        torch.testing.assert_close(left, right, **CLOSE)


def test_a_rank_alone_takes_a_ranks_path(batch, monkeypatch):
    """Statistics and then the rest, where a whole vocabulary needs one launch; the same numbers."""
    import rank
    from dapo_kernels.triton_rows import launches

    monkeypatch.setattr(rank, "COLUMNS_OF_A_RANK", (COLUMNS,))
    hidden, weight, vectors = batch
    options = {"denominator": float(vectors[3].sum()), "implementation": "triton", **peers.CLIP}
    found, launched = [], []
    for columns in (COLUMNS, COLUMNS + 1):
        before = launches.copy()
        with rank.as_a_rank(columns):
            result = clipped_policy_loss(hidden @ weight.t(), *vectors, **options)
            linear = linear_clipped_policy_loss(hidden, weight, *vectors, **options)
        found.append(torch.stack([result.loss, result.logprobs.sum(), linear.loss]))
        launched.append(launches - before)
    torch.testing.assert_close(*found, **CLOSE)
    assert launched == [{"row_statistics_kernel": 2, "clipped_loss_kernel": 2}, {"clipped_loss_kernel": 2}]
