import pytest
import torch
from dapo_kernels import logprobs, logprobs_and_entropy
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.reference import row_values

INFINITY = float("inf")


def random_rows(rows: int, columns: int, seed: int, sigma: float = 3.0, vocab: int | None = None):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, columns, generator=generator, dtype=torch.float64) * sigma
    return logits, torch.randint(0, vocab or columns, (rows,), generator=generator), generator


def pull(logits: torch.Tensor, targets: torch.Tensor, g_l: torch.Tensor, g_h: torch.Tensor, **options):
    """(log-probs, entropy, gradient) of the kernel under the cotangents g_l, g_h; the caller's logits stay."""
    leaf = logits.clone().requires_grad_()
    found = logprobs_and_entropy(leaf, targets, **options)
    l_N, h_N = found.logprobs.detach().clone(), found.entropy.detach().clone()
    ((found.logprobs * g_l).sum() + (found.entropy * g_h).sum()).backward()
    return l_N, h_N, leaf.grad


def expected(
    logits: torch.Tensor, targets: torch.Tensor, g_l: torch.Tensor, g_h: torch.Tensor, temperature=1.0, vocab=None
):
    leaf = logits.detach().double().requires_grad_()
    l_N, h_N = row_values(leaf, targets, temperature, vocab or logits.shape[1])
    ((l_N * g_l.double()).sum() + (h_N * g_h.double()).sum()).backward()
    return l_N.detach(), h_N.detach(), leaf.grad


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    padding=st.integers(0, 5),
    seed=st.integers(0, 2**31),
    temperature=st.one_of(st.floats(0.1, 5.0), st.just("a row")),
    skipped=st.floats(0, 1),
    in_place=st.booleans(),
    chunk=st.sampled_from([1, 7, 64, 1 << 22]),
)
@settings(deadline=None, max_examples=150)
def test_values_and_gradient_in_fp64(rows, columns, padding, seed, temperature, skipped, in_place, chunk):
    logits, targets, generator = random_rows(rows, columns + padding, seed, vocab=columns)
    if temperature == "a row":
        temperature = torch.rand(rows, generator=generator, dtype=torch.float64) * 3 + 0.2
    mask = torch.rand(rows, generator=generator) >= skipped
    g_l, g_h = torch.randn(2, rows, generator=generator, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "CPU_CHUNK_ELEMENTS", chunk)
        l_N, h_N, gradient = pull(
            logits, targets, g_l, g_h,
            temperature=temperature, vocab_size=columns, row_mask=mask, in_place=in_place,
        )  # fmt: skip
    l_64, h_64, gradient_64 = expected(logits, targets, g_l * mask, g_h * mask, temperature, columns)
    close = {"rtol": 1e-11, "atol": 1e-11}
    torch.testing.assert_close(l_N, l_64 * mask, **close)
    torch.testing.assert_close(h_N, h_64 * mask, **close)
    torch.testing.assert_close(gradient, gradient_64, **close)
    assert not gradient[:, columns:].any() and not gradient[~mask].any()


@given(
    seed=st.integers(0, 2**31), sigma=st.sampled_from([0.01, 1.0, 10.0]), shift=st.sampled_from([0.0, -500.0, 500.0])
)
@settings(deadline=None, max_examples=40)
def test_a_constant_added_to_a_row_changes_nothing(seed, sigma, shift):
    logits, targets, generator = random_rows(6, 33, seed, sigma)
    g_l, g_h = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    for found, wanted in zip(pull(logits + shift, targets, g_l, g_h), expected(logits, targets, g_l, g_h), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_statistics_are_fp32_or_fp64_and_the_gradient_has_the_dtype_of_the_logits(dtype):
    logits, targets, _ = random_rows(4, 12, 0)
    ones = torch.ones(4)
    l_N, h_N, gradient = pull(logits.to(dtype), targets, ones, ones)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert (l_N.dtype, h_N.dtype, gradient.dtype) == (wide, wide, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_low_precision_logits_lose_nothing_but_their_own_rounding(dtype, temperature):
    logits, targets, generator = random_rows(64, 300, 1, sigma=2.0)
    logits = logits.to(dtype)
    g_l, g_h = torch.randn(2, 64, generator=generator)
    l_N, h_N, gradient = pull(logits, targets, g_l, g_h, temperature=temperature)
    l_64, h_64, gradient_64 = expected(logits, targets, g_l, g_h, temperature)
    torch.testing.assert_close(l_N.double(), l_64, rtol=0, atol=8e-6)
    torch.testing.assert_close(h_N.double(), h_64, rtol=0, atol=8e-6)
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-24
    scale = g_l.abs().double() + g_h.abs().double() * 10
    bound = rounding * gradient_64.abs() + (scale * 1e-6)[:, None]
    assert ((gradient.double() - gradient_64).abs() <= bound).all()


def test_in_place_writes_the_gradient_over_the_logits_and_otherwise_leaves_them():
    logits, targets, _ = random_rows(5, 9, 3)
    mask = torch.tensor([True, False, True, True, False])
    gradients = {}
    for in_place in (True, False):
        leaf = logits.clone().requires_grad_()
        work = leaf * 1  # not a leaf, as the logits of a model
        work.retain_grad()
        logprobs_and_entropy(work, targets, row_mask=mask, in_place=in_place, vocab_size=9).logprobs.sum().backward()
        gradients[in_place] = leaf.grad
        after = gradients[True] if in_place else logits
        torch.testing.assert_close(work.detach(), after, rtol=0, atol=0)
    torch.testing.assert_close(gradients[True], gradients[False], rtol=0, atol=0)
    assert gradients[True].any()


def test_all_negative_rows():
    # a maximum that starts from 0 instead of −inf fails here
    logits, targets, generator = random_rows(8, 20, 4)
    logits = -logits.abs() - 300
    g_l, g_h = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    for found, wanted in zip(pull(logits, targets, g_l, g_h), expected(logits, targets, g_l, g_h), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_of_minus_infinity_count_as_absent(dtype):
    logits, _, generator = random_rows(6, 15, 5)
    absent = torch.zeros(15, dtype=torch.bool)
    absent[[0, 4, 14]] = True
    logits = logits.to(dtype)
    logits[:, absent] = -INFINITY
    kept = (~absent).nonzero().squeeze(1)
    position = torch.randint(0, len(kept), (6,), generator=generator)
    g_l, g_h = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    l_N, h_N, gradient = pull(logits, kept[position], g_l.to(dtype), g_h.to(dtype))
    l_64, h_64, gradient_64 = expected(logits[:, kept].contiguous(), position, g_l, g_h)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(l_N.double(), l_64, **close)
    torch.testing.assert_close(h_N.double(), h_64, **close)
    torch.testing.assert_close(gradient[:, kept].double(), gradient_64, **close)
    assert not gradient[:, absent].any()


def test_a_target_of_probability_zero_has_logprob_minus_infinity_and_spoils_no_other_row():
    logits = torch.zeros(2, 4, dtype=torch.float64)
    logits[0, 1] = -INFINITY
    found = logprobs_and_entropy(logits, torch.tensor([1, 1]))
    assert found.logprobs[0] == -INFINITY
    torch.testing.assert_close(found.logprobs[1], -torch.tensor(4.0).double().log())
    torch.testing.assert_close(found.entropy, torch.tensor([3.0, 4.0]).double().log())


def test_garbage_in_padded_columns_does_not_show():
    logits, targets, generator = random_rows(4, 12, 6, vocab=7)
    g_l, g_h = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    clean = pull(logits, targets, g_l, g_h, vocab_size=7)
    logits[:, 7] = float("nan")
    logits[:, 8] = INFINITY
    logits[:, 9:] = 1e30
    for a, b in zip(pull(logits, targets, g_l, g_h, vocab_size=7), clean, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("columns", [1, 2, 50])
@pytest.mark.parametrize("value", [0.0, -7.0, 1e4])
def test_equal_logits_are_uniform(columns, value):
    logits = torch.full((3, columns), value)
    l_N, h_N, gradient = pull(logits, torch.zeros(3, dtype=torch.int64), torch.ones(3), torch.ones(3))
    log_v = torch.tensor(float(columns)).log()
    torch.testing.assert_close(l_N, -log_v.expand(3), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(h_N, log_v.expand(3), rtol=1e-6, atol=1e-6)
    wanted = torch.full((3, columns), -1 / columns)
    wanted[:, 0] += 1  # entropy is at its maximum: its gradient is 0
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_logits_of_ten_thousand_keep_their_digits():
    # z_y − lse would round 1e4 + log 3 to 1e-3; (z_y − max) − log Σ does not
    for level in (1e4, -1e4):
        logits = torch.tensor([[level, level, level, level - 1.0]])
        found = logprobs_and_entropy(logits, torch.tensor([3]))
        l_64, h_64 = row_values(logits.double(), torch.tensor([3]), 1.0, 4)
        assert abs(found.logprobs.double() - l_64) < 3e-7
        assert abs(found.entropy.double() - h_64) < 3e-7


def test_nan_in_a_skipped_row_does_not_spread():
    logits, targets, generator = random_rows(4, 10, 7)
    g_l, g_h = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    mask = torch.tensor([True, False, True, True])
    clean = pull(logits, targets, g_l, g_h, row_mask=mask)
    logits[1] = float("nan")
    targets[1] = 999  # never looked at
    for a, b in zip(pull(logits, targets, g_l, g_h, row_mask=mask), clean, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), INFINITY])
def test_nan_or_infinity_in_a_row_asked_for_is_named(bad):
    logits = torch.zeros(4, 6)
    logits[2, 5] = bad
    with pytest.raises(ValueError, match="row 2"):
        logprobs_and_entropy(logits, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="row 2"):
        logprobs_and_entropy(
            logits, torch.zeros(4, dtype=torch.int64), row_mask=torch.tensor([False, True, True, False])
        )


def test_a_row_of_nothing_but_minus_infinity_is_refused():
    with pytest.raises(ValueError, match="row 1"):
        logprobs_and_entropy(torch.tensor([[0.0, 1.0], [-INFINITY, -INFINITY]]), torch.tensor([0, 0]))


@pytest.mark.parametrize(("target", "vocab"), [(-1, None), (6, None), (5, 5), (-100, None)])
def test_targets_outside_the_vocabulary_are_refused(target, vocab):
    with pytest.raises(ValueError, match=r"targets must lie in 0\.\.\d"):
        logprobs_and_entropy(torch.zeros(2, 6), torch.tensor([0, target]), vocab_size=vocab)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logits": torch.zeros(6, 2).t()}, "contiguous"),
        ({"logits": torch.zeros(12)}, "contiguous"),
        ({"logits": torch.zeros(2, 6, dtype=torch.int64)}, "bf16"),
        ({"targets": torch.zeros(2, dtype=torch.int32)}, "int64"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "int64"),
        ({"row_mask": torch.ones(3, dtype=torch.bool)}, "row_mask"),
        ({"row_mask": torch.ones(2)}, "row_mask"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": torch.ones(3)}, "temperature"),
        ({"temperature": torch.ones(2, 1)}, "temperature"),
        ({"temperature": torch.tensor([1.0, 0.0])}, "temperature"),
        ({"temperature": torch.tensor(-1.0)}, "temperature"),
        ({"vocab_size": 7}, "vocab_size"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"implementation": "magic"}, "implementation"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    arguments = {"logits": torch.zeros(2, 6), "targets": torch.zeros(2, dtype=torch.int64), **changes}
    with pytest.raises(ValueError, match=message):
        logprobs_and_entropy(arguments.pop("logits"), arguments.pop("targets"), **arguments)


def test_a_temperature_of_a_skipped_row_is_not_looked_at():
    temperature = torch.tensor([1.0, 0.0], dtype=torch.float64)
    logits = torch.tensor([[0.0, 1.0], [2.0, 3.0]], dtype=torch.float64)
    mask = torch.tensor([True, False])
    l_N, _, gradient = pull(
        logits, torch.tensor([0, 0]), torch.ones(2), torch.zeros(2), temperature=temperature, row_mask=mask
    )
    assert torch.isfinite(gradient).all()
    assert l_N[0] < 0 and l_N[1] == 0


def test_no_row_at_all():
    leaf = torch.empty(0, 5, requires_grad=True)
    found = logprobs_and_entropy(leaf, torch.empty(0, dtype=torch.int64))
    assert found.logprobs.shape == found.entropy.shape == (0,)
    found.logprobs.sum().backward()
    assert leaf.grad.shape == (0, 5)
