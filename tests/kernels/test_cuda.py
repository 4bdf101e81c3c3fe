"""The kernels on a card: the numbers against fp64, the flags, and what must not happen (waits, compilations, copies of
the logits). Skipped where there is none; the interpreter and the ahead-of-time tests cover the rest."""

from contextlib import contextmanager, nullcontext

import pytest
import torch
from dapo_kernels import (
    clipped_policy_loss,
    device_errors,
    linear_clipped_policy_loss,
    linear_logprobs_and_entropy,
    logprobs_and_entropy,
)

from tests.kernels.linear_cases import OPTIONS, head_and_batch
from tests.kernels.linear_cases import by_logits as wanted_by_logits
from tests.kernels.reference import clipped_loss
from tests.kernels.test_policy_loss import batch

DEVICE = torch.device("cuda")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
HALF_ULP = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-11}


@pytest.fixture(autouse=True)
def no_flags_left():
    device_errors()
    yield
    device_errors()


def on_card(arguments, dtype):
    logits, targets, *vectors = arguments
    return [logits.to(dtype).to(DEVICE), targets.to(DEVICE), *(v.float().to(DEVICE) for v in vectors)]


def gradient_of(arguments, **options):
    """(PolicyLoss, gradient) by Triton; the caller's logits stay."""
    leaf = arguments[0].clone().requires_grad_()
    found = clipped_policy_loss(leaf * 1, *arguments[1:], implementation="triton", **OPTIONS | options)
    return found, *torch.autograd.grad(found.loss, leaf)


@contextmanager
def no_wait():
    """An error where something waits for the device."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("dtype", list(HALF_ULP))
@pytest.mark.parametrize(("columns", "vocab"), [(19008, 19008), (19008, 18633), (1001, 1001), (152064, 151936)])
def test_materialised_against_fp64(dtype, columns, vocab, whole, monkeypatch):
    """By one kernel as for a vocabulary that is whole, and by two as a rank of several has it."""
    from dapo_kernels import triton_rows

    monkeypatch.setattr(triton_rows, "WHOLE_ROWS_AT_ONCE", whole)
    arguments = on_card(batch(40, columns, 1, vocab=vocab), dtype)
    wanted = clipped_loss(*arguments, **OPTIONS, vocab=vocab)
    arguments[0][:, vocab:] = float("nan")
    found, gradient = gradient_of(arguments, vocab_size=vocab)
    assert not device_errors()
    size = 4 * 2**-23 * (1 + arguments[0][:, :vocab].double().abs().amax(1) + arguments[2].double().abs())
    for name in ("logprobs", "entropy"):
        assert ((getattr(found, name) - getattr(wanted, name)).abs() <= 2 * size).all(), name
    pull = wanted.c_N.abs() + (arguments[4] * OPTIONS["entropy_coefficient"]).double() * (4 + size * 2**21)
    bound = (size * pull)[:, None] + wanted.gradient_NV.abs() * 2 * HALF_ULP[dtype] + 2**-24
    assert ((gradient.double() - wanted.gradient_NV).abs() <= bound).all()
    assert not gradient[:, vocab:].any() and gradient.any()
    torch.testing.assert_close(found.loss.double(), wanted.loss, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [0.0, 0.4])
@pytest.mark.parametrize("main_grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fused_linear_against_fp64(dtype, main_grad, masked):
    arguments = [x.to(DEVICE) for x in head_and_batch(300, 256, 1032, 5, dtype=dtype, masked=masked)]
    _, d_hidden, d_weight = wanted_by_logits(*arguments)
    x, w = arguments[0].clone().requires_grad_(), torch.nn.Parameter(arguments[1].clone())
    if main_grad:
        w.main_grad = torch.zeros(w.shape, device=DEVICE)
    linear_clipped_policy_loss(x, w, *arguments[2:], chunk_rows=128, **OPTIONS).loss.backward()
    tolerance = 0.01 if dtype == torch.bfloat16 else 1e-4
    for found, wanted in ((w.main_grad if main_grad else w.grad, d_weight), (x.grad, d_hidden)):
        assert (found.double() - wanted).abs().max() <= tolerance * wanted.abs().max()
    assert not device_errors()


def test_fused_log_probs_are_the_materialised_ones():
    hidden, weight, targets, *_ = (x.to(DEVICE) for x in head_and_batch(300, 256, 1032, 5, dtype=torch.bfloat16))
    found = linear_logprobs_and_entropy(hidden, weight, targets, chunk_rows=128)
    wanted = logprobs_and_entropy(hidden @ weight.t(), targets)
    for left, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0.05)  # the products may be rounded in another order


def test_bad_input_is_a_nan_and_a_flag():
    clean = on_card(batch(6, 64, 2), torch.bfloat16)
    clean[4].fill_(1.0)
    for change, flag in (("logits", "logits"), ("targets", "target"), ("weights", "setting")):
        arguments = [x.clone() for x in clean]
        if change == "logits":
            arguments[0][3, 7] = float("nan")
        elif change == "targets":
            arguments[1][3] = 64
        else:
            arguments[4][3] = -1.0
        found, _ = gradient_of(arguments)
        errors = device_errors()
        assert found.loss.isnan() and getattr(errors, flag) and sum(errors) == 1, (change, errors)
    clean[0][3], clean[4][3] = float("nan"), 0.0
    found, gradient = gradient_of(clean)
    assert torch.isfinite(found.loss) and not gradient[3].any() and not device_errors()


def test_no_compilation_as_the_number_of_rows_varies(monkeypatch):
    from dapo_kernels import row_kernels, triton_rows

    kernels = [
        getattr(row_kernels, name)
        for name in ("row_statistics_kernel", "clipped_loss_kernel", "logprobs_kernel", "row_gradient_kernel",
                     "scale_rows_kernel")
    ]  # fmt: skip

    def compiled():
        return [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]

    counts = None
    for rows in (8, 1, 2, 16, 17, 1000, 8191, 65535, 65536):
        logits = torch.randn(rows, 64, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
        targets, ones = torch.zeros(rows, dtype=torch.int64, device=DEVICE), torch.ones(rows, device=DEVICE)
        for whole in (True, False):  # one kernel, and a rank's two
            monkeypatch.setattr(triton_rows, "WHOLE_ROWS_AT_ONCE", whole)
            found = clipped_policy_loss(logits * 1, targets, -ones, ones, ones, implementation="triton", **OPTIONS)
            torch.autograd.grad(found.loss * 2, logits)
            scores = logprobs_and_entropy(logits * 1, targets, implementation="triton")
            torch.autograd.grad(scores.logprobs.sum() + scores.entropy.sum(), logits)
        counts = counts or compiled()
        assert compiled() == counts and min(counts) > 0, rows
    assert not device_errors()


def test_the_materialised_loss_neither_waits_nor_copies_the_logits():
    arguments = on_card(batch(2048, 19008, 3), torch.bfloat16)
    gradient_of([x[:8].contiguous() for x in arguments])  # compiles
    leaf = arguments[0].requires_grad_()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with no_wait():
        found = clipped_policy_loss(leaf, *arguments[1:], implementation="triton", **OPTIONS)
        torch.autograd.grad(found.loss, leaf)
    extra = torch.cuda.max_memory_allocated() - before
    assert extra < leaf.numel() * 2 / 16, f"{extra} bytes for logits of {leaf.numel() * 2}"


def test_the_fused_linear_loss_waits_for_nothing_where_its_rows_are_known():
    hidden, weight, *vectors = (x.to(DEVICE) for x in head_and_batch(300, 256, 1032, 5, dtype=torch.bfloat16))
    rows = (vectors[3] > 0).nonzero().squeeze(1)
    x, w = hidden.requires_grad_(), torch.nn.Parameter(weight)
    w.main_grad = torch.zeros(w.shape, device=DEVICE)
    for step in range(2):
        with no_wait() if step else nullcontext():  # the first one compiles and loads
            loss = linear_clipped_policy_loss(x, w, *vectors, rows=rows, chunk_rows=128, **OPTIONS).loss
            torch.autograd.grad(loss, x)
    assert not device_errors()
    assert linear_clipped_policy_loss(x, w, *vectors, rows=rows[1:], **OPTIONS).loss.isnan()
    assert device_errors().setting


def test_the_fused_linear_loss_needs_a_chunk_and_the_gradient_of_the_states():
    """16,384 rows of 19,008 columns, 5,120 wide: at most 0.25 GiB, also with rows dropped."""
    rows, columns, width = 16384, 19008, 5120
    hidden = torch.randn(rows, width, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    weight = torch.nn.Parameter(torch.randn(columns, width, device=DEVICE, dtype=torch.bfloat16) / width**0.5)
    weight.main_grad = torch.zeros(columns, width, device=DEVICE)
    targets = torch.randint(0, columns, (rows,), device=DEVICE)
    old, advantages = torch.full((2, rows), -10.0, device=DEVICE)
    for masked in (0.0, 0.3):
        weights = (torch.rand(rows, device=DEVICE) >= masked).float()
        for _ in range(2):  # the first one also makes what cuBLAS keeps
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            found = linear_clipped_policy_loss(hidden, weight, targets, old, advantages, weights, **OPTIONS)
            extra = torch.cuda.max_memory_allocated() - before
            del found
        assert extra <= 2**28, (masked, extra / 2**30)
