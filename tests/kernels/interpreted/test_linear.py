"""The fused linear ops by Triton against the materialised torch op in fp64."""

import weakref
from weakref import WeakSet

import pytest
import torch
from dapo_kernels import linear_clipped_policy_loss
from dapo_kernels.triton_rows import launches
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.kernels.linear_cases import (
    OPTIONS,
    assert_same,
    by_chunks,
    by_logits,
    head_and_batch,
    leaves,
    logprobs_by_chunks,
    logprobs_by_logits,
)
from tests.kernels.test_policy_loss import kl_options

CLOSE = {"rtol": 1e-4, "atol": 2e-5}


@pytest.mark.parametrize("chunk_rows", [4, 7, 2048])
@pytest.mark.parametrize(("columns", "vocab"), [(64, 64), (50, 47)])
@pytest.mark.parametrize("masked", [0.0, 0.4, 1.0])
def test_loss_and_gradients(chunk_rows, columns, vocab, masked):
    arguments = head_and_batch(19, 16, columns, 3, vocab=vocab, dtype=torch.float32, masked=masked)
    temperature = torch.linspace(0.5, 2.0, 19)
    kl = kl_options(("k3" if masked else "k2", 0.5, 0.5), arguments[3], 8)
    options = {"temperature": temperature, "vocab_size": vocab, "factor": 2.0, **kl}
    before = launches["clipped_loss_kernel"]
    found = by_chunks(*arguments, chunk_rows=chunk_rows, implementation="triton", **options)
    rows = int((arguments[5] > 0).sum())
    assert launches["clipped_loss_kernel"] - before == -(-rows // chunk_rows)
    assert_same(found, by_logits(*arguments, **options), **CLOSE)


@pytest.mark.parametrize("masked", [False, True])
def test_logprobs_and_entropy(masked):
    hidden, weight, targets, *_ = head_and_batch(19, 16, 50, 3, vocab=47, dtype=torch.float32)
    g_l, g_h = torch.randn(2, 19, generator=torch.Generator().manual_seed(0))
    options = {"temperature": 0.8, "vocab_size": 47, "row_mask": g_l > -0.3 if masked else None}
    found = logprobs_by_chunks(hidden, weight, targets, g_l, g_h, chunk_rows=8, implementation="triton", **options)
    for left, right in zip(found, logprobs_by_logits(hidden, weight, targets, g_l, g_h, **options), strict=True):
        torch.testing.assert_close(left.double(), right, **CLOSE)


def test_bf16_with_a_main_gradient():
    arguments = head_and_batch(40, 32, 64, 5, dtype=torch.bfloat16)
    _, d_hidden, d_weight = by_logits(*arguments)
    x, w = leaves(*arguments[:2])
    w.main_grad = torch.zeros(w.shape)
    result = linear_clipped_policy_loss(x, w, *arguments[2:], chunk_rows=16, implementation="triton", **OPTIONS)
    result.loss.backward()
    for found, wanted in ((w.main_grad, d_weight), (x.grad, d_hidden)):
        assert (found.double() - wanted).abs().max() <= 0.01 * wanted.abs().max()


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors made inside have held at once."""

    def __init__(self):
        super().__init__()
        self.held, self.peak, self.known = 0, 0, WeakSet()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        for tensor in tree_leaves((arguments, options)):
            if isinstance(tensor, torch.Tensor):
                self.known.add(tensor.untyped_storage())  # another's, or counted when it was made
        result = function(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                storage, size = tensor.untyped_storage(), tensor.untyped_storage().nbytes()
                self.known.add(storage)
                self.held += size
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._release, size)
        return result

    def _release(self, size):
        self.held -= size


@pytest.mark.parametrize("masked", [0.0, 0.3])
def test_no_more_memory_than_a_chunk_of_logits_and_the_gradient_of_the_states(masked):
    """16,384 rows of 19,008 columns and 5,120 wide, each divided by 16, so memory by 256: at most 0.25 GiB / 256 beside
    the row vectors, with dropped rows too."""
    rows, columns, width = 16384 // 16, 19008 // 16, 5120 // 16
    arguments = head_and_batch(rows, width, columns, 3, dtype=torch.bfloat16, masked=masked)
    x, w = leaves(*arguments[:2])
    w.main_grad = torch.zeros_like(w.data)  # of the weight's dtype: a CPU would make fp32 copies of the factors first
    with LiveBytes() as memory:
        result = linear_clipped_policy_loss(
            x, w, *arguments[2:], chunk_rows=2048 // 16, implementation="triton", **OPTIONS
        )
    assert result.loss.requires_grad
    row_vectors = 40 * rows
    assert 2 * rows * width < memory.peak <= 2**30 // 4 // 256 + row_vectors, memory.peak
