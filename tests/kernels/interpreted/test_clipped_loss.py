"""`clipped_policy_loss(implementation="triton")` against the fp64 definitions."""

import math

import pytest
import torch
from dapo_kernels import clipped_policy_loss
from dapo_kernels.triton_rows import launches
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from tests.kernels.reference import clipped_loss
from tests.kernels.test_policy_loss import KL_TERMS, batch, kl_options

OPTIONS = {"eps_low": 0.2, "eps_high": 0.28, "eps_dual": 3.0, "denominator": 7.0}
HALF_ULP = {torch.float32: 2**-24, torch.bfloat16: 2**-9, torch.float16: 2**-11}
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 2**-24}  # spacing of the subnormals


def run(arguments, implementation="triton", **options):
    """(PolicyLoss, gradient, launches of the loss kernel); the caller's tensors stay."""
    leaf = arguments[0].clone().requires_grad_()
    before = launches["clipped_loss_kernel"]
    result = clipped_policy_loss(leaf * 1, *arguments[1:], implementation=implementation, **options)
    result.loss.backward()
    return result, leaf.grad, launches["clipped_loss_kernel"] - before


def in_dtype(arguments, dtype):
    logits, targets, old, advantages, weights = arguments
    return [logits.to(dtype), targets, old.float(), advantages.float(), weights.float()]


def row_bound(wanted, logits, old, temperature, vocab):
    """4·2⁻²³·(1 + max|z/T| + |old|)·(|c| + entropy part) a row: what fp32 can keep."""
    z = logits[:, :vocab].double().abs()
    scale = temperature if isinstance(temperature, float) else temperature[:, None].double()
    size = 1 + (z / scale).nan_to_num(posinf=0.0).amax(1) + old.double().abs()
    return 4 * 2**-23 * size, (1 / scale if isinstance(scale, float) else (1 / scale).squeeze(1))


def check(
    found, gradient, wanted, arguments, dtype, *, temperature, vocab, entropy_coefficient, denominator,
    reference_logprobs=0.0, **_,
):  # fmt: skip
    logits, _, old, _, weights = arguments
    size, inverse = row_bound(wanted, logits, old, temperature, vocab)
    for name in ("logprobs", "entropy"):
        assert ((getattr(found, name) - getattr(wanted, name)).abs() <= size).all(), name
    assert ((found.ratio - wanted.ratio).abs() <= 2 * size * wanted.ratio).all()
    for name in ("low", "high", "dual"):
        assert torch.equal(getattr(found, f"clipped_{name}"), getattr(wanted, name)), name
    pull = wanted.c_N.abs() + (weights * entropy_coefficient / denominator).double().abs() * (4 + size * 2**21)
    reference = torch.as_tensor(reference_logprobs).double().abs()
    # Δ and e^(−Δ) are rounded too, and exp near 20 loses five bits of its argument
    pull = pull + wanted.kl_pull_N * (2 + reference)
    overflows = wanted.gradient_NV.to(dtype).isinf()  # beyond fp16: both must say so
    assert torch.equal(gradient.isinf(), overflows)
    bound = (size * pull * inverse)[:, None] + wanted.gradient_NV.abs() * 2 * HALF_ULP[dtype] + SMALLEST[dtype]
    assert (((gradient.double() - wanted.gradient_NV).abs() <= bound) | overflows).all()
    terms = (wanted.ratio.clamp(max=1e9) * weights.double() + wanted.kl_pull_N * (1 + reference)).sum() + 1
    assert math.isclose(float(found.loss), float(wanted.loss), rel_tol=1e-4, abs_tol=1e-4 * float(terms))


@given(
    rows=st.integers(1, 20),
    columns=st.one_of(st.integers(1, 40), st.sampled_from([64, 128, 136, 200])),
    padding=st.integers(0, 9),
    dtype=st.sampled_from(list(HALF_ULP)),
    seed=st.integers(0, 2**31),
    drift=st.sampled_from([0.0, 0.3, 3.0, 30.0]),
    eps_low=st.floats(0.0, 0.9),
    eps_high=st.floats(0.0, 3.0),
    eps_dual=st.one_of(st.none(), st.floats(1.01, 20.0)),
    temperature=st.one_of(st.floats(0.2, 4.0), st.just("a row")),
    entropy_coefficient=st.sampled_from([0.0, 0.01, -0.5, 2.0]),
    denominator=st.floats(0.1, 100.0),
    in_place=st.booleans(),
    kl=KL_TERMS,
)
@settings(deadline=None, max_examples=80, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # no shrinking: slow
def test_everything_follows_the_fp64_formula(
    rows, columns, padding, dtype, seed, drift, eps_low, eps_high, eps_dual, temperature, entropy_coefficient,
    denominator, in_place, kl,
):  # fmt: skip
    arguments = in_dtype(batch(rows, columns + padding, seed, drift=drift, vocab=columns), dtype)
    arguments[0][:, columns:] = float("nan")  # padding is never looked at
    if temperature == "a row":
        temperature = torch.rand(rows, generator=torch.Generator().manual_seed(seed)) * 2 + 0.3
    options = {
        "eps_low": eps_low, "eps_high": eps_high, "eps_dual": eps_dual, "denominator": denominator,
        "temperature": temperature, "entropy_coefficient": entropy_coefficient, **kl_options(kl, arguments[2], seed),
    }  # fmt: skip
    plain = [arguments[0].clone(), *arguments[1:]]
    plain[0][:, columns:] = 0
    wanted = clipped_loss(*plain, vocab=columns, **options)
    trained = arguments[4] > 0
    edges = torch.tensor([1 - eps_low, 1 + eps_high, eps_dual or 1 - eps_low], dtype=torch.float64)
    log_ratio = (wanted.logprobs - arguments[2])[trained]
    # rounding decides at the edges themselves; they have tests of their own
    assume(((wanted.ratio[trained][:, None] / edges - 1).abs() > 1e-4).all())
    assume(((log_ratio.abs() - 20).abs() > 1e-3).all())
    if kl is not None:
        gap = (wanted.logprobs - options["reference_logprobs"])[trained]
        assume(((gap.abs() - 20).abs() > 1e-3).all())
    if drift == 0.0:
        assume(eps_low > 1e-3 and eps_high > 1e-3)
    found, gradient, launched = run(arguments, vocab_size=columns, in_place=in_place, **options)
    assert launched == 1
    assert not gradient[:, columns:].any()
    assert not gradient[~trained].any()
    check(found, gradient, wanted, plain, dtype, vocab=columns, **options)


@pytest.mark.parametrize("sigma", [0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_fp32_keeps_the_digits_that_fp32_can_keep(sigma, temperature):
    arguments = in_dtype(batch(64, 4096, 11, sigma=sigma), torch.float32)
    logits, targets, *_ = arguments
    true = torch.log_softmax(logits.double() / temperature, 1).gather(1, targets[:, None]).squeeze(1)
    arguments[2] = (true + torch.linspace(-1, 1, 64)).float()
    options = OPTIONS | {"temperature": temperature, "eps_dual": 2.0}
    wanted = clipped_loss(*arguments, **options)
    assert wanted.low.any() and wanted.high.any() and wanted.dual.any()
    _, gradient, _ = run(arguments, **options)
    _, eager, _ = run(arguments, "torch", **options)
    size, _ = row_bound(wanted, arguments[0], arguments[2], temperature, 4096)
    # the bound is on ∂loss/∂(z/T); c carries the whole row's scale
    error = (gradient.double() - wanted.gradient_NV).abs().amax(1) * temperature
    eager_error = (eager.double() - wanted.gradient_NV).abs().amax(1) * temperature
    moves = wanted.c_N != 0
    assert moves.sum() > 10
    assert (error <= size * wanted.c_N.abs()).all()
    relative, eager_relative = (e[moves] / (size * wanted.c_N.abs())[moves] for e in (error, eager_error))
    assert relative.max() <= 2 * eager_relative.max() + 0.01, (relative.max(), eager_relative.max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_the_exact_gradient(dtype):
    arguments = in_dtype(batch(48, 2056, 5, sigma=3.0), dtype)
    options = OPTIONS | {"denominator": 0.05}
    wanted = clipped_loss(*arguments, **options)
    _, gradient, _ = run(arguments, **options)
    exact = wanted.gradient_NV
    rounding = (exact.to(dtype).double() - exact).abs()
    one_ulp = 2 * HALF_ULP[dtype] * exact.abs() + SMALLEST[dtype]
    error = (gradient.double() - exact).abs()
    assert (error <= rounding + one_ulp + 1e-30).all()
    # truncation would err twice as far on average: rounding to nearest is what arrives
    live = exact.abs() > 1e-3
    assert error[live].mean() <= 1.05 * rounding[live].mean() + 1e-12


CLIP_EDGES = [
    # ratio, advantage, gradient flows, (low, high, dual)
    (0.799, -1.0, False, (True, False, False)),
    (0.801, -1.0, True, (False, False, False)),
    (0.5, 1.0, True, (False, False, False)),
    (1.279, 1.0, True, (False, False, False)),
    (1.281, 1.0, False, (False, True, False)),
    (2.0, -1.0, True, (False, False, False)),
    (2.999, -1.0, True, (False, False, False)),
    (3.001, -1.0, False, (False, False, True)),
    (5.0, 1.0, False, (False, True, False)),
    (math.exp(19.9), 0.0, False, (False, False, False)),
    (math.exp(-19.9), 1.0, True, (False, False, False)),
    (math.exp(-20.1), 1.0, False, (False, False, False)),
]


def test_each_side_of_each_edge():
    count = len(CLIP_EDGES)
    logits, targets, *_ = batch(count, 96, 3)
    true = torch.log_softmax(logits.float().double(), 1).gather(1, targets[:, None]).squeeze(1)
    old = true - torch.tensor([math.log(ratio) for ratio, *_ in CLIP_EDGES], dtype=torch.float64)
    advantages = torch.tensor([a for _, a, *_ in CLIP_EDGES])
    found, gradient, _ = run([logits.float(), targets, old.float(), advantages, torch.ones(count)], **OPTIONS)
    flags = list(zip(found.clipped_low.tolist(), found.clipped_high.tolist(), found.clipped_dual.tolist(), strict=True))
    assert flags == [wanted for *_, wanted in CLIP_EDGES]
    assert gradient.any(1).tolist() == [flows for _, _, flows, _ in CLIP_EDGES]


def test_exactly_at_an_edge_the_unclipped_gradient_flows():
    logits, targets, *_ = batch(6, 64, 9)
    rest = [torch.zeros(6), torch.ones(6), torch.ones(6)]
    here = run([logits.float(), targets, *rest], **OPTIONS)[0].logprobs
    options = {"eps_low": 0.0, "eps_high": 0.0, "eps_dual": None, "denominator": 1.0}
    for advantage in (1.0, -1.0):
        arguments = [logits.float(), targets, here, torch.full((6,), advantage), torch.ones(6)]
        found, gradient, _ = run(arguments, **options)
        assert torch.equal(found.ratio, torch.ones(6))
        assert not found.clipped_low.any() and not found.clipped_high.any()
        assert gradient.any(1).all()


@pytest.mark.parametrize(
    ("estimator", "delta"), [("k3", 1e-3), ("k3", -0.12), ("k3", 0.12), ("k3", -3.0), ("k2", 1e-3)]
)
def test_the_kl_term_keeps_its_digits_near_zero(estimator, delta):
    """e^(−Δ) − 1 + Δ in fp32 would leave none at 1e-3."""
    logits, targets, old, _, _ = in_dtype(batch(1, 24, 2), torch.float32)
    rest = [targets, old, torch.zeros(1), torch.ones(1)]
    here = run([logits, *rest], **OPTIONS)[0].logprobs
    options = OPTIONS | {"kl_coefficient": 1.0, "kl_estimator": estimator, "reference_logprobs": here - delta}
    exact = (here.double() - (here - delta).double()).item()
    value = exact**2 / 2 if estimator == "k2" else math.expm1(-exact) + exact
    found, _, _ = run([logits, *rest], **options)
    assert found.loss.item() == pytest.approx(value / 7.0, rel=2e-6 if abs(exact) < 0.1 else 2e-5)


def test_advantage_zero_and_no_entropy_bonus_write_zeros_without_reading():
    logits, targets, old, _, _ = in_dtype(batch(5, 40, 2), torch.float32)
    _, gradient, _ = run([logits, targets, old, torch.zeros(5), torch.ones(5)], **OPTIONS)
    assert not gradient.any()
    bonus = OPTIONS | {"entropy_coefficient": 0.1}
    arguments = [logits, targets, old, torch.zeros(5), torch.ones(5)]
    found, gradient, _ = run(arguments, **bonus)
    assert gradient.any(1).all()
    check(
        found, gradient, clipped_loss(*arguments, **bonus), arguments, torch.float32, temperature=1.0, vocab=40, **bonus
    )


@pytest.mark.parametrize("implementation", ["triton", "torch"])
def test_the_backward_factor(implementation):
    arguments = in_dtype(batch(9, 56, 4), torch.float32)
    _, gradient, _ = run(arguments, implementation, **OPTIONS)
    leaf = arguments[0].clone().requires_grad_()
    before = launches["scale_rows_kernel"]
    result = clipped_policy_loss(leaf * 1, *arguments[1:], implementation=implementation, **OPTIONS)
    (result.loss * -3.5).backward()
    torch.testing.assert_close(leaf.grad, gradient * -3.5, rtol=1e-6, atol=0)
    assert launches["scale_rows_kernel"] - before == (1 if implementation == "triton" else 0)


def test_backward_runs_once_rather_than_giving_a_wrong_number():
    arguments = in_dtype(batch(4, 24, 4), torch.float32)
    leaf = arguments[0].clone().requires_grad_()
    result = clipped_policy_loss(leaf * 1, *arguments[1:], implementation="triton", **OPTIONS)
    result.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        result.loss.backward()


def test_in_place_the_gradient_lies_in_the_logits_when_forward_returns():
    arguments = in_dtype(batch(4, 24, 4), torch.float32)
    _, gradient, _ = run(arguments, **OPTIONS)
    logits = arguments[0].clone().requires_grad_() * 1
    clipped_policy_loss(logits, *arguments[1:], implementation="triton", **OPTIONS)
    assert torch.equal(logits.detach(), gradient)
    # whoever needs the logits afterwards is told
    exponential = (arguments[0].clone().requires_grad_() * 1).exp()
    clipped_policy_loss(exponential, *arguments[1:], implementation="triton", **OPTIONS)
    with pytest.raises(RuntimeError, match="inplace"):
        exponential.sum().backward()


@pytest.mark.parametrize("keep", ["in_place=False", "no_grad", "detached"])
def test_the_logits_stay_as_they_are(keep):
    arguments = in_dtype(batch(4, 24, 4), torch.bfloat16)
    logits = arguments[0].clone().requires_grad_(keep != "detached")
    with torch.set_grad_enabled(keep != "no_grad"):
        result = clipped_policy_loss(
            logits, *arguments[1:], implementation="triton", in_place=keep != "in_place=False", **OPTIONS
        )
    assert torch.equal(logits.detach(), arguments[0])
    assert result.loss.requires_grad == (keep == "in_place=False")
    assert not result.logprobs.requires_grad and not result.entropy.requires_grad


def test_tensors_as_settings_and_any_float_dtype_of_the_row_vectors():
    arguments = in_dtype(batch(7, 40, 4), torch.float32)
    found, gradient, _ = run(arguments, **OPTIONS | {"temperature": 0.7})
    wide = [arguments[0], arguments[1], *(vector.double() for vector in arguments[2:])]
    other, other_gradient, _ = run(
        wide, **OPTIONS | {"temperature": torch.full((7,), 0.7), "denominator": torch.tensor(7.0)}
    )
    torch.testing.assert_close(other.loss, found.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(other_gradient, gradient, rtol=1e-5, atol=1e-7)
