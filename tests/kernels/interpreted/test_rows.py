"""`logprobs_and_entropy(implementation="triton")`, and what went wrong in kernels of this kind elsewhere."""

import sys

import pytest
import torch
from dapo_kernels import clipped_policy_loss, device_errors, logprobs_and_entropy, triton_rows
from dapo_kernels.arguments import shard_of
from dapo_kernels.triton_rows import launches
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.kernels.reference import clipped_loss, row_values

INFINITY = float("inf")
OPTIONS = {"eps_low": 0.2, "eps_high": 0.28, "eps_dual": None, "denominator": 3.0}
PEAK = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-11}


def pull(logits, targets, g_l, g_h, **options):
    """(l, H, gradient) under the cotangents g_l, g_h."""
    leaf = logits.clone().requires_grad_()
    found = logprobs_and_entropy(leaf * 1, targets, **{"implementation": "triton"} | options)
    ((found.logprobs * g_l).sum() + (found.entropy * g_h).sum()).backward()
    return found.logprobs.detach(), found.entropy.detach(), leaf.grad


def exact(logits, targets, g_l, g_h, temperature=1.0, vocab=None):
    leaf = logits.double().requires_grad_()
    l_N, h_N = row_values(leaf, targets, temperature, vocab or logits.shape[1])
    ((l_N * g_l.double()).sum() + (h_N * g_h.double()).sum()).backward()
    return l_N.detach(), h_N.detach(), leaf.grad


@given(
    rows=st.integers(1, 20),
    columns=st.one_of(st.integers(1, 40), st.sampled_from([64, 128, 136, 200])),
    padding=st.integers(0, 9),
    dtype=st.sampled_from(list(PEAK)),
    seed=st.integers(0, 2**31),
    sigma=st.sampled_from([0.1, 3.0, 20.0]),
    temperature=st.one_of(st.floats(0.2, 4.0), st.just("a row")),
    skipped=st.sampled_from([0.0, 0.3, 1.0]),
    in_place=st.booleans(),
)
@settings(
    deadline=None, max_examples=60, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)  # shrinking takes minutes
def test_values_and_gradient(rows, columns, padding, dtype, seed, sigma, temperature, skipped, in_place):
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(rows, columns + padding, generator=generator) * sigma).to(dtype)
    targets = torch.randint(0, columns, (rows,), generator=generator)
    mask = torch.rand(rows, generator=generator) >= skipped
    if temperature == "a row":
        temperature = torch.rand(rows, generator=generator) * 3 + 0.2
    g_l, g_h = torch.randn(2, rows, generator=generator)
    wanted = exact(logits, targets, g_l * mask, g_h * mask, temperature, columns)
    logits[:, columns:] = float("nan")
    logits[~mask] = float("nan")
    logits[~mask, 0] = INFINITY
    l_N, h_N, gradient = pull(
        logits, torch.where(mask, targets, -5), g_l, g_h,
        temperature=temperature, vocab_size=columns, row_mask=mask, in_place=in_place,
    )  # fmt: skip
    scale = temperature if isinstance(temperature, float) else temperature[:, None]
    size = 4 * 2**-23 * (1 + (logits.masked_fill(~mask[:, None], 0)[:, :columns].float().abs() / scale).amax(1))
    assert not l_N[~mask].any() and not h_N[~mask].any() and not gradient[~mask].any()
    rounding = 2**-23 * wanted[0].abs()  # of the log-prob itself: log V counts, which no logit shows
    assert ((l_N - wanted[0]).abs() <= size + rounding)[mask].all()
    assert ((h_N - wanted[1]).abs() <= 2 * size)[mask].all()
    strength = size * (g_l.abs() + g_h.abs() * (4 + 2**21 * size)) / torch.as_tensor(scale).reshape(-1)
    bound = strength[:, None] + wanted[2].abs() * 2 * PEAK[dtype] + 2**-24
    assert ((gradient - wanted[2]).abs() <= bound).all()
    assert not gradient[:, columns:].any()


def _both(logits, targets, weights=None, **options):
    """The clipped loss and its gradient by Triton, and the fp64 definition's."""
    count = logits.shape[0]
    old = torch.zeros(count) if "old" not in options else options.pop("old")
    rest = (old, torch.ones(count), torch.ones(count) if weights is None else weights)
    leaf = logits.clone().requires_grad_()
    before = launches["clipped_loss_kernel"]
    found = clipped_policy_loss(leaf * 1, targets, *rest, implementation="triton", **OPTIONS, **options)
    found.loss.backward()
    assert launches["clipped_loss_kernel"] == before + 1
    options["vocab"] = options.pop("vocab_size", None)
    return found, leaf.grad, clipped_loss(logits, targets, *rest, **OPTIONS, **options)


def _close(found, gradient, wanted, tolerance=2e-5):
    for name in ("logprobs", "entropy"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(wanted, name), rtol=1e-5, atol=tolerance)
        assert torch.isfinite(getattr(found, name)).all()
    torch.testing.assert_close(gradient.double(), wanted.gradient_NV, rtol=1e-4, atol=tolerance)


@pytest.mark.parametrize("level", [-300.0, -1e4, 1e4])
def test_rows_far_from_zero(level):
    """A kernel that starts its maximum at 0, or subtracts a log-sum from a large logit, fails here."""
    logits = torch.randn(9, 130, generator=torch.Generator().manual_seed(0)) + level
    targets = torch.arange(9) * 14
    found, gradient, wanted = _both(logits, targets, old=torch.full((9,), -5.0))
    assert (found.logprobs <= 0).all()
    _close(found, gradient, wanted)


def test_logits_of_ten_thousand_either_way():
    logits = torch.randn(8, 200, generator=torch.Generator().manual_seed(1)) * 1e4
    targets = torch.arange(8)
    targets[:4] = logits[:4].argmax(1)
    found, gradient, wanted = _both(logits, targets)
    _close(found, gradient, wanted, tolerance=1e-2)  # 1e4 in fp32 has steps of 1e-3
    assert torch.isfinite(gradient).all()


def test_equal_logits():
    found, gradient, wanted = _both(torch.full((3, 24), -7.0), torch.tensor([0, 11, 23]), vocab_size=20 + 4)
    _close(found, gradient, wanted)
    torch.testing.assert_close(found.entropy, torch.full((3,), 24.0).log())


def test_minus_infinity_and_padded_columns():
    logits = torch.randn(6, 72, generator=torch.Generator().manual_seed(2))
    logits[:, ::3] = -INFINITY
    logits[0, 1:] = -INFINITY  # one column is left: probability 1
    logits[0, 0] = 2.0
    logits[:, 65:] = 50.0
    targets = torch.tensor([0, 1, 2, 64, 4, 5])  # none of them −inf
    found, gradient, _ = _both(logits, targets, vocab_size=65)
    rest = (torch.zeros(6), torch.ones(6), torch.ones(6))
    # −1e5 has probability 0 in fp64 too, and no NaN in the reference
    wanted = clipped_loss(logits.clamp(min=-1e5), targets, *rest, **OPTIONS, vocab=65)
    assert float(found.logprobs[0]) == 0.0 and float(found.entropy[0]) == 0.0
    torch.testing.assert_close(gradient.double(), wanted.gradient_NV, rtol=1e-4, atol=1e-5)
    assert not gradient[:, 65:].any()
    torch.testing.assert_close(found.logprobs.double(), wanted.logprobs, rtol=1e-5, atol=1e-5)


def test_a_target_of_probability_zero_has_log_prob_minus_infinity_and_pulls_nothing():
    logits = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))
    logits[:, 5] = -INFINITY
    leaf = logits.clone().requires_grad_()
    found = clipped_policy_loss(
        leaf * 1, torch.tensor([5, 5]), torch.zeros(2), torch.ones(2), torch.ones(2), implementation="triton", **OPTIONS
    )
    found.loss.backward()
    assert (found.logprobs == -INFINITY).all() and torch.isfinite(found.loss)
    assert not leaf.grad.any()


def test_targets_on_the_edges_of_tiles_and_of_the_vocabulary():
    columns = 2 * 2048 * 4 + 8  # more than two tiles of the interpreter
    edges = [0, 3, 4, 8191, 8192, 16383, 16384, columns - 5, columns - 1]
    logits = torch.randn(len(edges), columns, generator=torch.Generator().manual_seed(4))
    found, gradient, wanted = _both(logits, torch.tensor(edges), old=torch.full((len(edges),), -9.0))
    _close(found, gradient, wanted)


def test_more_rows_than_a_grid_axis_of_65535():
    rows = 70_001
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(rows, 8, generator=generator)
    targets = torch.randint(0, 8, (rows,), generator=generator)
    found, gradient, wanted = _both(logits, targets, old=torch.full((rows,), -2.0))
    assert float(gradient[-1].abs().sum()) > 0
    _close(found, gradient, wanted)


def test_beyond_two_to_the_31_elements():
    """Rows whose first element lies beyond 2³¹; all other pages stay untouched, so little memory is used."""
    rows, columns = 2_056, 1 << 20
    assert (rows - 2) * columns > 2**31
    logits = torch.empty(rows, columns, dtype=torch.bfloat16)
    last = (torch.randn(2, columns, generator=torch.Generator().manual_seed(6)) * 2).bfloat16()
    logits[-2:] = last
    mask = torch.zeros(rows)
    mask[-2:] = 1
    targets = torch.zeros(rows, dtype=torch.int64)
    targets[-2:] = torch.tensor([columns - 1, 7])
    shard = shard_of(columns, None, None)
    wanted = row_values(last.double(), targets[-2:], 1.0, columns)
    parts = triton_rows.statistics(logits, targets, mask, 1.0, shard, None)
    for values in (
        triton_rows.finish(parts, targets, mask, 1.0, shard),
        triton_rows.logprobs(logits, targets, mask, 1.0, shard, None),
    ):
        torch.testing.assert_close(values.logprobs[-2:].double(), wanted[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(values.entropy[-2:].double(), wanted[1], rtol=1e-5, atol=1e-5)


def test_an_all_masked_micro_batch_and_an_empty_one():
    for rows in (5, 0):
        logits = torch.full((rows, 40), float("nan"))
        leaf = logits.clone().requires_grad_()
        empty = torch.full((rows,), float("nan"))
        found = clipped_policy_loss(
            leaf * 1, torch.full((rows,), -1), empty, empty, torch.zeros(rows), implementation="triton",
            entropy_coefficient=0.1, **OPTIONS,
        )  # fmt: skip
        found.loss.backward()
        assert float(found.loss) == 0.0 and torch.equal(leaf.grad.nan_to_num(9.0), torch.zeros(rows, 40))
        assert not found.ratio.any() and not found.entropy.any()


def test_auto_is_torch_on_a_cpu():
    logits = torch.randn(3, 8)
    before = launches.total()
    logprobs_and_entropy(logits, torch.tensor([1, 2, 3]))
    assert launches.total() == before
    logprobs_and_entropy(logits, torch.tensor([1, 2, 3]), implementation="triton")
    assert launches.total() == before + 1


ARGUMENTS = (torch.zeros(3), torch.ones(3), torch.ones(3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.tensor([0, 1, 20])}, "0..15; found 0..20"),
        ({"targets": torch.tensor([0, -1, 2])}, "found -1"),
        ({"logits": float("nan")}, "row 1 holds a NaN"),
        ({"logits": INFINITY}, "row 1 holds a NaN"),
        ({"denominator": 0.0}, "denominator=0.0 must be > 0"),
        ({"denominator": -1.0}, "denominator=-1.0"),
        ({"denominator": torch.tensor(float("nan"))}, "denominator=nan"),
        ({"temperature": 0.0}, "temperature=0.0 must be > 0"),
        ({"temperature": torch.tensor([1.0, 0.0, 1.0])}, "temperature must be > 0"),
        ({"temperature": torch.ones(2)}, "2 entries for 3 rows"),
        ({"eps_dual": 0.5}, "eps_dual=0.5 must be > 1"),
        ({"vocab_size": 17}, "1..16"),
        ({"loss_mask": torch.tensor([1.0, -1.0, 1.0])}, "weights must be >= 0"),
        ({"loss_mask": torch.tensor([1.0, float("nan"), 1.0])}, "weights must be >= 0"),
        ({"dtype": torch.float64}, "fp64 logits use 'auto' or 'torch'"),
    ],
)
def test_bad_input_raises_on_a_cpu(change, message):
    options = {"targets": torch.tensor([0, 1, 2]), "loss_mask": torch.ones(3), "denominator": 1.0}
    options |= {k: v for k, v in change.items() if k not in ("logits", "dtype")}
    logits = torch.randn(3, 16, dtype=change.get("dtype", torch.float32))
    if "logits" in change:
        logits[1, 4] = change["logits"]
    with pytest.raises(ValueError, match=message):
        clipped_policy_loss(
            logits, options.pop("targets"), torch.zeros(3), torch.ones(3), options.pop("loss_mask"),
            eps_low=0.2, eps_high=0.28, implementation="triton", **options,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(16, 3).t()}, "logits must be contiguous"),
        ({"logits": torch.zeros(3, 4, 4)}, "logits must be contiguous"),
        ({"logits": torch.zeros(3, 16, dtype=torch.int32)}, "bf16, fp16, fp32 or fp64"),
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "targets must be int64"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, "targets must be int64"),
        ({"old_logprobs": torch.zeros(2)}, "old_logprobs must be float"),
        ({"advantages": torch.zeros(3, dtype=torch.int64)}, "advantages must be float"),
        ({"loss_mask": torch.ones(3, dtype=torch.bool)}, "loss_mask must be float"),
        ({"denominator": torch.ones(2)}, "denominator must be one number"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_a_launch(change, message):
    good = {
        "logits": torch.zeros(3, 16), "targets": torch.zeros(3, dtype=torch.int64), "old_logprobs": torch.zeros(3),
        "advantages": torch.ones(3), "loss_mask": torch.ones(3), "denominator": 1.0,
    }  # fmt: skip
    before = launches.total()
    clipped_policy_loss(**good, eps_low=0.2, eps_high=0.28, implementation="triton")
    assert (launched := launches.total()) > before
    with pytest.raises(ValueError, match=message):
        clipped_policy_loss(**good | change, eps_low=0.2, eps_high=0.28, implementation="triton")
    assert launches.total() == launched


def test_a_row_of_nothing_but_minus_infinity_raises():
    logits = torch.randn(3, 16)
    logits[2] = -INFINITY
    with pytest.raises(ValueError, match="row 2"):
        logprobs_and_entropy(logits, torch.tensor([0, 1, 2]), implementation="triton")


def _on_device(logits, targets, weights, denominator=1.0):
    """The kernels without the checks that a CPU can afford: what a GPU runs."""
    count, shard = logits.shape[0], shard_of(logits.shape[1], None, None)
    one = torch.ones(())
    settings = triton_rows.ClipSettings(0.8, 1.28, INFINITY, 0.01)
    gradient = torch.empty_like(logits)
    zeros = torch.zeros(count)
    rows = triton_rows.clipped_loss(
        logits, gradient, targets, zeros, zeros + 1, weights, torch.full((1,), denominator), one, shard, None, settings
    )
    return rows, gradient, device_errors()


def test_the_device_flags_name_what_went_wrong_and_the_numbers_are_nan():
    logits, targets, ones = torch.randn(4, 24), torch.tensor([0, 1, 2, 3]), torch.ones(4)
    rows, gradient, errors = _on_device(logits, targets, ones)
    assert not errors and torch.isfinite(gradient).all()

    rows, gradient, errors = _on_device(logits, torch.tensor([0, 24, 2, -1]), ones)
    assert errors.target and not errors.logits and "target" in str(errors)
    assert rows.terms.isnan().tolist() == [False, True, False, True]
    assert gradient[1].isnan().all() and torch.isfinite(gradient[0]).all()
    assert not device_errors(), "reading clears the flags"

    for weights, denominator in (
        (torch.tensor([1.0, -1.0, 1.0, 1.0]), 1.0),
        (torch.tensor([1.0, float("nan"), 1.0, 1.0]), 1.0),
        (ones, 0.0),
        (ones, -2.0),
    ):
        rows, _, errors = _on_device(logits, targets, weights, denominator)
        assert errors.setting and not errors.target, (weights, denominator)
        assert rows.terms[1].isnan()


@pytest.mark.parametrize("part", [(float("nan"), float("nan")), (INFINITY, float("nan")), (-INFINITY, 0.0)])
def test_the_device_flag_for_logits(part):
    """(maximum, sum) as the statistics kernel leaves them for a NaN, a +inf and a row of −inf."""
    parts = torch.tensor([[[1.0, 2.0, 0.5, -0.1], [*part, 0.5, 0.0]]])
    one, shard = torch.ones(()), shard_of(8, None, None)
    values = torch.stack(triton_rows.finish(parts, torch.tensor([0, 1]), None, one, shard)[:2])
    errors = device_errors()
    assert errors.logits and not errors.target
    assert values[:, 1].isnan().all() and torch.isfinite(values[:, 0]).all()


@pytest.mark.parametrize("inverse", [-1.0, 0.0, INFINITY, float("nan")])
def test_the_device_flag_for_temperatures(inverse):
    parts = torch.tensor([[[1.0, 2.0, 0.5, -0.1]] * 2])
    values = torch.stack(
        triton_rows.finish(parts, torch.tensor([0, 1]), None, torch.tensor([1.0, inverse]), shard_of(8, None, None))[:2]
    )
    assert device_errors().setting
    assert values[:, 1].isnan().all() and torch.isfinite(values[:, 0]).all()


def test_what_the_statistics_kernel_leaves_for_unsound_rows():
    logits = torch.randn(3, 40)
    logits[0, 7], logits[1, 39], logits[2] = float("nan"), INFINITY, -INFINITY
    own = torch.empty(3, 4)
    tile = triton_rows.interpreter_tile(3, 40, 4)
    triton_rows._launch(
        triton_rows.row_kernels.row_statistics_kernel, tile, logits,
        logits, torch.tensor([0, 1, 2]), None, torch.ones(()), own, 3, 10, 40, 0, 0, 1.0,
        VECS=tile.vectors, LANES=tile.lanes, VEC=4, UNIT=4, PADDED=False,
    )  # fmt: skip
    assert own[0, 1].isnan() and own[1, 1].isnan() and own[2, 0] == -INFINITY and own[2, 1] == 0


def test_memory_that_is_written_between_forward_and_backward_is_noticed():
    leaf, targets, ones = torch.randn(3, 16, requires_grad=True), torch.tensor([1, 2, 3]), torch.ones(3)
    logits = leaf * 1
    first = clipped_policy_loss(logits, targets, -ones, ones, ones, implementation="triton", **OPTIONS)
    second = clipped_policy_loss(logits, targets, -ones, ones, ones, implementation="triton", **OPTIONS)
    with pytest.raises(RuntimeError, match="in_place=False"):
        (first.loss + second.loss).backward()


@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_a_second_derivative_is_refused(implementation):
    leaf, targets, ones = torch.randn(3, 16, requires_grad=True), torch.tensor([1, 2, 3]), torch.ones(3)
    loss = clipped_policy_loss(leaf * 1, targets, -ones, ones, ones, implementation=implementation, **OPTIONS).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_the_flags_outlive_inference_mode(monkeypatch):
    monkeypatch.setattr(sys.modules["dapo_kernels.device_errors"], "_FLAGS", {})
    with torch.inference_mode():
        logprobs_and_entropy(torch.randn(3, 16), torch.tensor([1, 2, 3]), implementation="triton")
    assert not device_errors()
