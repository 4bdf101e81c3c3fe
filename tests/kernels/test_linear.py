"""The fused linear ops by torch, in fp64, against the same ops on whole logits."""

import pytest
import torch
from dapo_kernels import linear, linear_chunks, linear_clipped_policy_loss, linear_logprobs_and_entropy
from hypothesis import given, settings
from hypothesis import strategies as st

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
from tests.kernels.test_policy_loss import KL_TERMS, kl_options

CLOSE = {"rtol": 1e-10, "atol": 1e-11}


@given(
    rows=st.integers(1, 14),
    width=st.integers(1, 9),
    columns=st.integers(1, 20),
    padding=st.integers(0, 4),
    seed=st.integers(0, 2**31),
    chunk_rows=st.sampled_from([1, 3, 5, 2048]),
    masked=st.sampled_from([0.0, 0.3, 1.0]),
    temperature=st.one_of(st.floats(0.3, 3.0), st.just("a row")),
    entropy_coefficient=st.sampled_from([0.0, 0.05]),
    factor=st.sampled_from([1.0, -2.5]),
    kl=KL_TERMS,
)
@settings(deadline=None, max_examples=100)
def test_loss_and_gradients_are_those_of_whole_logits(
    rows, width, columns, padding, seed, chunk_rows, masked, temperature, entropy_coefficient, factor, kl
):
    if temperature == "a row":
        temperature = torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
    arguments = head_and_batch(
        rows, width, columns + padding, seed, vocab=columns, masked=masked, temperature=temperature
    )
    options = {
        "temperature": temperature, "vocab_size": columns, "factor": factor, "entropy_coefficient": entropy_coefficient,
        **kl_options(kl, arguments[3], seed),
    }  # fmt: skip
    assert_same(by_chunks(*arguments, chunk_rows=chunk_rows, **options), by_logits(*arguments, **options), **CLOSE)


@given(
    rows=st.integers(1, 14),
    columns=st.integers(1, 20),
    padding=st.integers(0, 4),
    seed=st.integers(0, 2**31),
    chunk_rows=st.sampled_from([1, 3, 2048]),
    masked=st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_logprobs_and_entropy_are_those_of_whole_logits(rows, columns, padding, seed, chunk_rows, masked):
    hidden, weight, targets, *_ = head_and_batch(rows, 6, columns + padding, seed, vocab=columns)
    g_l, g_h = torch.randn(2, rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mask = g_l > -0.3 if masked else None
    options = {"temperature": 0.8, "vocab_size": columns, "row_mask": mask}
    found = logprobs_by_chunks(hidden, weight, targets, g_l, g_h, chunk_rows=chunk_rows, **options)
    for left, right in zip(found, logprobs_by_logits(hidden, weight, targets, g_l, g_h, **options), strict=True):
        torch.testing.assert_close(left, right, **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_main_grad_is_added_to_in_the_forward_pass(dtype):
    arguments = head_and_batch(9, 8, 24, 1, dtype=dtype)
    _, d_hidden, d_weight = by_logits(*arguments)
    x, w = leaves(*arguments[:2])
    w.main_grad = torch.full(w.shape, 2.0)
    result = linear_clipped_policy_loss(x, w, *arguments[2:], chunk_rows=4, **OPTIONS)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.01}
    torch.testing.assert_close(w.main_grad.double() - 2.0, d_weight, **tolerance)
    accumulated = w.main_grad.clone()
    result.loss.backward()
    torch.testing.assert_close(x.grad.double(), d_hidden, **tolerance)
    assert w.grad is None and torch.equal(w.main_grad, accumulated)


def test_main_grad_carries_the_loss_scale_it_was_told_and_no_other():
    arguments = head_and_batch(9, 8, 24, 1)
    _, d_hidden, d_weight = by_logits(*arguments, factor=8.0)
    x, w = leaves(*arguments[:2])
    w.main_grad = torch.zeros_like(w.data)
    result = linear_clipped_policy_loss(x, w, *arguments[2:], gradient_scale=8.0, **OPTIONS)
    (result.loss * 8.0).backward()
    torch.testing.assert_close(w.main_grad, d_weight, **CLOSE)
    torch.testing.assert_close(x.grad, d_hidden, **CLOSE)
    result = linear_clipped_policy_loss(x, w, *arguments[2:], **OPTIONS)
    with pytest.raises(ValueError, match=r"factor 8\.0, but gradient_scale=1\.0"):
        (result.loss * 8.0).backward()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("op", ["loss", "logprobs"])
def test_a_gradient_hook_fires_and_finds_nothing_to_add(tied, op):
    """As Megatron's data-parallel wrapper does it, with a weight that also embeds the tokens when tied."""
    arguments = head_and_batch(9, 8, 24, 1)
    hidden, weight, targets, *vectors = arguments
    w = torch.nn.Parameter(weight.clone())
    w.main_grad, w.grad_added_to_main_grad, w.zero_out_wgrad = torch.zeros_like(w.data), False, tied
    fired = []

    def hook(parameter):
        fired.append(parameter)
        if not parameter.grad_added_to_main_grad or parameter.zero_out_wgrad:
            parameter.main_grad.add_(parameter.grad)
        parameter.grad = None

    w.register_post_accumulate_grad_hook(hook)
    reference = torch.nn.Parameter(weight.clone())

    def states(matrix):
        embedded = torch.nn.functional.embedding(targets, matrix) if tied else hidden.clone().requires_grad_()
        return embedded * 1.5

    from dapo_kernels import clipped_policy_loss, logprobs_and_entropy

    if op == "loss":
        linear_clipped_policy_loss(states(w), w, targets, *vectors, **OPTIONS).loss.backward()
        clipped_policy_loss(states(reference) @ reference.t(), targets, *vectors, **OPTIONS).loss.backward()
    else:
        linear_logprobs_and_entropy(states(w), w, targets).logprobs.sum().backward()
        logprobs_and_entropy(states(reference) @ reference.t(), targets).logprobs.sum().backward()
    assert len(fired) == 1
    torch.testing.assert_close(w.main_grad, reference.grad, **CLOSE)


def test_without_a_gradient_the_same_numbers_and_no_product_but_one(monkeypatch):
    arguments = head_and_batch(11, 8, 24, 3)
    wanted = vars(by_chunks(*arguments)[0])
    monkeypatch.setattr(linear_chunks.LinearGradients, "add", lambda *_: pytest.fail("a gradient was computed"))
    for x, context in ((arguments[0], torch.enable_grad()), (arguments[0].clone().requires_grad_(), torch.no_grad())):
        with context:
            found = linear_clipped_policy_loss(x, *arguments[1:], chunk_rows=4, **OPTIONS)
        assert not found.loss.requires_grad
        for name, value in vars(found).items():
            torch.testing.assert_close(value, wanted[name].detach(), **CLOSE)


@pytest.mark.parametrize("only", ["hidden", "weight"])
def test_one_gradient_alone(only):
    arguments = head_and_batch(9, 8, 24, 1)
    _, *wanted = by_logits(*arguments)
    x, w = arguments[0].clone(), arguments[1].clone()
    leaf = (x if only == "hidden" else w).requires_grad_()
    linear_clipped_policy_loss(x, w, *arguments[2:], **OPTIONS).loss.backward()
    torch.testing.assert_close(leaf.grad, wanted[only == "weight"], **CLOSE)


def test_rows_without_weight_never_reach_a_product():
    arguments = list(head_and_batch(9, 8, 24, 1))
    wanted = by_chunks(*arguments)
    masked = arguments[5] == 0
    assert masked.any()
    arguments[0][masked] = float("nan")
    arguments[2][masked] = -7
    arguments[3][masked] = arguments[4][masked] = float("nan")
    found = by_chunks(*arguments)
    assert_same(found, (wanted[0], wanted[1], wanted[2]), **CLOSE)
    assert not found[1][masked].any()


@pytest.mark.parametrize("masked", [0.0, 0.4, 1.0])
def test_rows_that_the_caller_knows_need_not_be_looked_for(masked, monkeypatch):
    arguments = head_and_batch(11, 8, 24, 1, masked=masked)
    mask = arguments[5] > 0
    rows = mask.nonzero().squeeze(1)
    g_l, g_h = torch.randn(2, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = by_logits(*arguments)
    wanted_logprobs = logprobs_by_logits(*arguments[:3], g_l, g_h, row_mask=mask)
    monkeypatch.setattr(linear, "linear_head", _without_nonzero(linear.linear_head))
    assert_same(by_chunks(*arguments, rows=rows, chunk_rows=3), wanted, **CLOSE)
    found = logprobs_by_chunks(*arguments[:3], g_l, g_h, rows=rows, chunk_rows=3)
    for left, right in zip(found, wanted_logprobs, strict=True):
        torch.testing.assert_close(left, right, **CLOSE)


def _without_nonzero(function):
    def wrapped(*arguments, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "nonzero", lambda *_: pytest.fail("the device would be waited for"))
            return function(*arguments, **options)

    return wrapped


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 1, 2, 3], "names 4 rows, not the 5"),
        ([0, 1, 2, 3, 5], "increase within 0..4"),
        ([1, 0, 2, 3, 4], "increase within 0..4"),
        ([-1, 1, 2, 3, 4], "increase within 0..4"),
        ([0, 1, 2, 3, 4, 5], "rows must be int64"),
    ],
)
def test_rows_that_are_not_those_of_weight_are_refused(rows, message):
    arguments = head_and_batch(5, 8, 24, 1, masked=0.0)
    with pytest.raises(ValueError, match=message):
        linear_clipped_policy_loss(*arguments, rows=torch.tensor(rows), **OPTIONS)
    with pytest.raises(ValueError, match="rows must be int64"):
        linear_clipped_policy_loss(*arguments, rows=torch.tensor(rows).float(), **OPTIONS)


def test_backward_runs_once():
    arguments = head_and_batch(5, 8, 24, 1)
    x, w = leaves(*arguments[:2])
    loss = linear_clipped_policy_loss(x, w, *arguments[2:], **OPTIONS).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.randn(24, 7, dtype=torch.float64)}, "hidden has 8 columns, weight has 7"),
        ({"weight": torch.randn(24, 8)}, "make them equal"),
        ({"weight": torch.randn(8, 24, dtype=torch.float64).t()}, "contiguous matrix"),
        ({"hidden": torch.randn(5, 2, 4, dtype=torch.float64)}, "contiguous matrix"),
        ({"chunk_rows": 0}, "chunk_rows=0"),
        ({"denominator": 0.0}, "denominator=0.0"),
        ({"targets": torch.tensor([0, 1, 24, 0, 0])}, "0..23"),
        ({"targets": torch.tensor([0, 1])}, "targets must be int64"),
        ({"advantages": torch.zeros(4)}, "advantages must be float"),
        ({"vocab_size": 25}, "1..24"),
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"implementation": "magic"}, "implementation='magic'"),
    ],
)
def test_bad_input(change, message):
    names = ("hidden", "weight", "targets", "old_logprobs", "advantages", "loss_mask")
    arguments = dict(zip(names, head_and_batch(5, 8, 24, 1, masked=0.0), strict=True)) | OPTIONS | change
    with pytest.raises(ValueError, match=message):
        linear_clipped_policy_loss(**arguments)


def test_a_nan_in_the_states_raises():
    arguments = head_and_batch(5, 8, 24, 1, masked=0.0)
    arguments[0][3, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        linear_clipped_policy_loss(*arguments, **OPTIONS)
