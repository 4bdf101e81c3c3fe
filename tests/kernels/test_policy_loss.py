import math

import pytest
import torch
from dapo_kernels import clipped_policy_loss, logprobs_and_entropy
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.kernels.reference import Expected, clipped_loss

CLIP = {"eps_low": 0.2, "eps_high": 0.28}


def batch(rows: int, columns: int, seed: int, *, sigma: float = 2.0, drift: float = 0.5, vocab: int | None = None):
    """Logits, targets, old log-probs near the true ones, advantages with zeros, weights 0 to 1.75 (fp64)."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    logits = normal(rows, columns) * sigma
    targets = torch.randint(0, vocab or columns, (rows,), generator=generator)
    true = torch.log_softmax(logits[:, : vocab or columns], 1).gather(1, targets[:, None]).squeeze(1)
    advantages = normal(rows) * (torch.rand(rows, generator=generator) > 0.2)
    kinds = torch.tensor([0.0, 1.0, 0.25, 1.75], dtype=torch.float64)
    weights = kinds[torch.randint(0, 4, (rows,), generator=generator)]
    return logits, targets, true + normal(rows) * drift, advantages, weights


KL_TERMS = st.one_of(
    st.none(),
    st.tuples(st.sampled_from(["k2", "k3"]), st.sampled_from([0.04, 1.0]), st.sampled_from([0.01, 1.0, 15.0])),
)


def kl_options(kl: tuple[str, float, float] | None, old: torch.Tensor, seed: int) -> dict:
    """Options of a KL term (estimator, coefficient, distance of the reference from the old policy)."""
    if kl is None:
        return {}
    estimator, coefficient, distance = kl
    noise = torch.randn(old.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    reference = (old.double() + noise * distance).to(old.dtype)
    return {"reference_logprobs": reference, "kl_coefficient": coefficient, "kl_estimator": estimator}


def run(arguments, **options):
    """(PolicyLoss, gradient) with the caller's tensors left as they are."""
    leaf = arguments[0].clone().requires_grad_()
    result = clipped_policy_loss(leaf, *arguments[1:], **options)
    result.loss.backward()
    return result, leaf.grad


def compare(found, gradient: torch.Tensor, wanted: Expected, **close: float) -> None:
    torch.testing.assert_close(found.loss.detach().double(), wanted.loss, **close)
    for name in ("logprobs", "ratio", "entropy"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(wanted, name), **close)
    for name in ("low", "high", "dual"):
        assert torch.equal(getattr(found, f"clipped_{name}"), getattr(wanted, name)), name
    torch.testing.assert_close(gradient.double(), wanted.gradient_NV, **close)


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 30),
    padding=st.integers(0, 4),
    seed=st.integers(0, 2**31),
    drift=st.sampled_from([0.0, 0.3, 3.0, 30.0]),
    eps_low=st.floats(0.0, 1.0),
    eps_high=st.floats(0.0, 3.0),
    eps_dual=st.one_of(st.none(), st.floats(1.01, 20.0)),
    temperature=st.one_of(st.floats(0.2, 4.0), st.just("a row")),
    entropy_coefficient=st.sampled_from([0.0, 0.01, -0.5, 2.0]),
    denominator=st.floats(0.1, 1e4),
    in_place=st.booleans(),
    kl=KL_TERMS,
)
@settings(deadline=None, max_examples=250)
def test_everything_equals_the_fp64_formula(
    rows, columns, padding, seed, drift, eps_low, eps_high, eps_dual, temperature, entropy_coefficient, denominator,
    in_place, kl,
):  # fmt: skip
    arguments = batch(rows, columns + padding, seed, drift=drift, vocab=columns)
    if temperature == "a row":
        temperature = torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 0.3
    options = {
        "eps_low": eps_low, "eps_high": eps_high, "eps_dual": eps_dual, "denominator": denominator,
        "temperature": temperature, "entropy_coefficient": entropy_coefficient, **kl_options(kl, arguments[2], seed),
    }  # fmt: skip
    wanted = clipped_loss(*arguments, vocab=columns, **options)
    # rounding decides at the edges themselves; they have tests of their own
    edges = torch.tensor([1 - eps_low, 1 + eps_high, eps_dual or 1 - eps_low], dtype=torch.float64)
    trained = arguments[4] > 0
    log_ratio = (wanted.logprobs - arguments[2])[trained]
    assume(
        ((wanted.ratio[trained][:, None] - edges).abs() > 1e-9).all() and ((log_ratio.abs() - 20).abs() > 1e-9).all()
    )
    if kl is not None:
        gap = (wanted.logprobs - options["reference_logprobs"])[trained]
        assume(((gap.abs() - 20).abs() > 1e-9).all())
    found, gradient = run(arguments, vocab_size=columns, in_place=in_place, **options)
    compare(found, gradient, wanted, rtol=1e-9, atol=1e-9)


@given(seed=st.integers(0, 2**31), sigma=st.sampled_from([0.5, 3.0, 10.0]), temperature=st.sampled_from([1.0, 0.7]))
@settings(deadline=None, max_examples=60)
def test_fp32_accuracy(seed, sigma, temperature):
    arguments = tuple(x.float() if x.is_floating_point() else x for x in batch(16, 100, seed, sigma=sigma, drift=0.1))
    logits, _, old, _, _ = arguments
    options = {**CLIP, "eps_dual": 10.0, "denominator": 16.0, "temperature": temperature}
    wanted = clipped_loss(*arguments, **options)
    edges = torch.tensor([0.8, 1.28, 10.0]).double()
    assume(((wanted.ratio[:, None] - edges).abs() > 1e-4).all())
    found, gradient = run(arguments, **options)
    size = 1 + (logits / temperature).abs().amax(1).double() + old.abs().double()
    bound = 4 * 2**-23 * size * wanted.c_N.abs() / temperature
    assert ((gradient.double() - wanted.gradient_NV).abs().amax(1) <= bound + 1e-12).all()
    trained = arguments[4] > 0
    assert ((found.logprobs.double() - wanted.logprobs).abs() <= 4 * 2**-23 * size).all()
    relative = (found.ratio.double() / wanted.ratio - 1).abs()
    assert (relative[trained] <= 8 * 2**-23 * size[trained]).all()


@pytest.mark.parametrize("sigma", [1.0, 10.0, 30.0])
def test_fp32_error_is_at_most_twice_that_of_torchs_own_log_softmax(sigma):
    logits, targets, _, advantages, _ = batch(256, 400, 11, sigma=sigma)
    logits, advantages = logits.float(), advantages.float()
    leaf = logits.clone().requires_grad_()
    naive = torch.log_softmax(leaf, 1).gather(1, targets[:, None]).squeeze(1)
    old = naive.detach().clone()
    ((naive - old).exp() * -advantages).sum().backward()
    weights = torch.ones(256)
    options = {**CLIP, "eps_dual": None, "denominator": 1.0}
    exact = clipped_loss(logits, targets, old, advantages, weights, **options).gradient_NV
    _, gradient = run((logits, targets, old, advantages, weights), **options)
    assert (gradient.double() - exact).abs().max() <= 2 * (leaf.grad.double() - exact).abs().max()


@pytest.mark.parametrize("seed", range(5))
def test_bf16_is_no_worse_than_the_rounded_exact_gradient_plus_one_ulp(seed):
    logits, targets, old, advantages, weights = batch(64, 128, seed, sigma=1.5, drift=0.1)
    logits = logits.to(torch.bfloat16)
    arguments = (logits, targets, old.float(), advantages.float(), weights.float())
    options = {**CLIP, "eps_dual": 10.0, "denominator": 64.0}
    exact = clipped_loss(*arguments, **options).gradient_NV
    _, gradient = run(arguments, **options)
    assert gradient.dtype == torch.bfloat16
    rounded = exact.to(torch.bfloat16).double()
    ulp = 2.0 ** (torch.frexp(exact).exponent - 8).double()
    assert ((gradient.double() - exact).abs() <= (rounded - exact).abs() + ulp * (exact != 0)).all()


def one_row(advantage: float, old: float):
    """p = (1/4, 3/4) exactly enough: l of token 0 is −log 4."""
    logits = torch.tensor([[0.0, math.log(3.0)]], dtype=torch.float64)
    return (
        logits,
        torch.tensor([0]),
        torch.tensor([old]).double(),
        torch.tensor([advantage]).double(),
        torch.ones(1).double(),
    )


def ratio_of(old: float) -> float:
    found, _ = run(one_row(1.0, old), eps_low=1.0, eps_high=1e9, denominator=1.0)
    return float(found.ratio)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("shift", [0.2, -0.2])
@pytest.mark.parametrize("beyond", [False, True])
def test_clip_edges_belong_to_the_interval(advantage, shift, beyond):
    arguments = one_row(advantage, -math.log(4.0) - shift)
    ratio = ratio_of(-math.log(4.0) - shift)
    # |ratio − 1| is exact (Sterbenz), so that 1 ± ε is the ratio itself
    edge = abs(ratio - 1)
    if beyond:
        edge -= 1e-12
    found, gradient = run(arguments, eps_low=edge, eps_high=edge, denominator=1.0)
    clips = beyond and (shift > 0) == (advantage > 0)
    assert bool(found.clipped_high) is (clips and advantage > 0)
    assert bool(found.clipped_low) is (clips and advantage < 0)
    flowing = torch.tensor([[-ratio * advantage * 0.75, ratio * advantage * 0.75]], dtype=torch.float64)
    torch.testing.assert_close(gradient, torch.zeros(1, 2).double() if clips else flowing)
    assert found.loss.item() == pytest.approx(-ratio * advantage)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_an_empty_clip_range_still_holds_ratio_one(dtype, advantage):
    # the first update of a step: the ratio is exactly 1, which is both edges when ε = 0
    logits, targets, *_ = batch(8, 20, 2)
    logits = logits.to(dtype)
    old = logprobs_and_entropy(logits.clone(), targets).logprobs
    arguments = (logits, targets, old, torch.full_like(old, advantage), torch.ones_like(old))
    found, gradient = run(arguments, eps_low=0.0, eps_high=0.0, eps_dual=1.5, denominator=8.0)
    assert (found.ratio == 1).all()
    assert not (found.clipped_low | found.clipped_high | found.clipped_dual).any()
    assert gradient.any(dim=1).all()


# ε 0.2 and 0.28, ε_dual 10, |A| = 2: (A, ratio, L, ∂L/∂l, flag)
REGIONS = [
    (2.0, 0.5, -1.0, -1.0, None),
    (2.0, 1.1, -2.2, -2.2, None),
    (2.0, 1.5, -2.56, 0.0, "clipped_high"),
    (2.0, 20.0, -2.56, 0.0, "clipped_high"),
    (-2.0, 0.5, 1.6, 0.0, "clipped_low"),
    (-2.0, 1.1, 2.2, 2.2, None),
    (-2.0, 1.5, 3.0, 3.0, None),
    (-2.0, 9.9, 19.8, 19.8, None),
    (-2.0, 20.0, 20.0, 0.0, "clipped_dual"),
    (0.0, 20.0, 0.0, 0.0, None),
]


@pytest.mark.parametrize(("advantage", "ratio", "loss", "slope", "flag"), REGIONS)
def test_every_clip_region_by_hand(advantage, ratio, loss, slope, flag):
    """Weight 1, denominator 1; ∂l/∂z of token 0 is (3/4, −3/4)."""
    old = -math.log(4.0) - math.log(ratio)
    found, gradient = run(one_row(advantage, old), **CLIP, eps_dual=10.0, denominator=1.0)
    assert found.loss.item() == pytest.approx(loss, rel=1e-6)
    assert gradient[0].tolist() == pytest.approx([0.75 * slope, -0.75 * slope], rel=1e-6)
    flags = [name for name in ("clipped_low", "clipped_high", "clipped_dual") if getattr(found, name).any()]
    assert flags == ([flag] if flag else [])


@pytest.mark.parametrize("beyond", [False, True])
def test_the_dual_clip_bound_belongs_to_the_unclipped_side(beyond):
    old = -math.log(4.0) - 1.3
    ratio = ratio_of(old)
    bound = ratio * (1 - 1e-12) if beyond else ratio
    found, gradient = run(one_row(-2.0, old), **CLIP, eps_dual=bound, denominator=1.0)
    assert bool(found.clipped_dual) is beyond
    assert gradient.any().item() is not beyond
    assert found.loss.item() == pytest.approx(2.0 * bound)


def test_dual_clip_bounds_only_negative_advantages_and_only_when_asked():
    old = -math.log(4.0) - math.log(50.0)  # ratio 50
    capped, gradient = run(one_row(-2.0, old), **CLIP, eps_dual=10.0, denominator=1.0)
    assert capped.loss.item() == pytest.approx(20.0) and not gradient.any()
    assert float(capped.ratio) == pytest.approx(50.0)  # the ratio reported is the true one
    free, gradient = run(one_row(-2.0, old), **CLIP, eps_dual=None, denominator=1.0)
    assert free.loss.item() == pytest.approx(100.0) and gradient.any() and not free.clipped_dual.any()
    positive, _ = run(one_row(2.0, old), **CLIP, eps_dual=10.0, denominator=1.0)
    assert positive.loss.item() == pytest.approx(-2 * 1.28) and not positive.clipped_dual.any()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_ratio", [25.0, -25.0, 1e6, -1e6])
def test_log_ratio_is_clamped_to_twenty_without_gradient(advantage, log_ratio):
    arguments = one_row(advantage, -math.log(4.0) - log_ratio)
    found, gradient = run(arguments, eps_low=1.0, eps_high=1e12, denominator=1.0)
    assert float(found.ratio) == pytest.approx(math.exp(math.copysign(20, log_ratio)))
    assert torch.isfinite(found.loss) and not gradient.any()
    inside, gradient = run(
        one_row(advantage, -math.log(4.0) - math.copysign(19.9, log_ratio)), eps_low=1.0, eps_high=1e12, denominator=1.0
    )
    assert float(inside.ratio) == pytest.approx(math.exp(math.copysign(19.9, log_ratio))) and gradient.any()


def test_advantage_zero_gives_no_loss_no_gradient_and_no_flags():
    logits, targets, old, _, _ = batch(10, 12, 3, drift=2.0)
    found, gradient = run((logits, targets, old, old * 0, torch.ones_like(old)), **CLIP, eps_dual=1.1, denominator=10.0)
    assert found.loss == 0 and not gradient.any()
    assert not (found.clipped_low | found.clipped_high | found.clipped_dual).any()
    assert (found.ratio > 0).all()


def test_entropy_bonus_reaches_clipped_and_advantage_zero_rows():
    logits, targets, old, _, _ = batch(6, 9, 4, drift=0.0)
    options = {**CLIP, "denominator": 6.0, "entropy_coefficient": 0.1}
    found, gradient = run((logits, targets, old - 5, torch.ones_like(old), torch.ones_like(old)), **options)
    assert found.clipped_high.all()
    (entropy_only,) = torch.autograd.grad(_entropy_loss(leaf := logits.clone().requires_grad_(), 0.1, 6.0), leaf)
    torch.testing.assert_close(gradient, entropy_only)


def _entropy_loss(logits: torch.Tensor, coefficient: float, denominator: float) -> torch.Tensor:
    logp = torch.log_softmax(logits, 1)
    return coefficient * (logp.exp() * logp).sum() / denominator


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("entropy_coefficient", [0.0, 0.3])
def test_a_batch_without_weight_gives_loss_and_gradient_zero(in_place, entropy_coefficient):
    logits, targets, old, advantages, _ = batch(5, 7, 5)
    logits[0] = float("nan")
    found, gradient = run(
        (logits, targets, old, advantages, torch.zeros(5)),
        **CLIP, denominator=3.0, in_place=in_place, entropy_coefficient=entropy_coefficient,
    )  # fmt: skip
    assert found.loss == 0 and torch.equal(gradient, torch.zeros(5, 7).double())
    assert not any(
        getattr(found, name).any() for name in ("logprobs", "ratio", "entropy", "clipped_low", "clipped_high")
    )


def test_anything_in_rows_of_weight_zero_is_ignored():
    arguments = list(batch(12, 10, 6))
    masked = arguments[4] == 0
    assert masked.any() and not masked.all()
    options = {**CLIP, "eps_dual": 3.0, "denominator": 12.0, "entropy_coefficient": 0.1}
    clean, clean_gradient = run(arguments, **options)
    spoiled = [x.clone() for x in arguments]
    spoiled[0][masked] = float("nan")
    spoiled[1][masked] = -100  # the ignore index of other libraries
    spoiled[2][masked] = float("-inf")
    spoiled[3][masked] = float("nan")
    found, gradient = run(spoiled, **options)
    torch.testing.assert_close(found.loss, clean.loss, rtol=0, atol=0)
    torch.testing.assert_close(gradient, clean_gradient, rtol=0, atol=0)


def test_nan_in_a_trained_row_is_refused():
    logits, targets, old, advantages, weights = batch(6, 8, 7)
    weights[3] = 0.5
    logits[3, 2] = float("nan")
    with pytest.raises(ValueError, match="row 3"):
        clipped_policy_loss(logits, targets, old, advantages, weights, **CLIP, denominator=1.0)


@pytest.mark.parametrize("in_place", [True, False])
def test_the_incoming_gradient_scales_ours(in_place):
    arguments = batch(6, 8, 8)
    options = {**CLIP, "denominator": 2.0, "entropy_coefficient": 0.05}
    _, gradient = run(arguments, **options)
    leaf = arguments[0].clone().requires_grad_()
    (clipped_policy_loss(leaf, *arguments[1:], **options, in_place=in_place).loss * -3.5).backward()
    torch.testing.assert_close(leaf.grad, gradient * -3.5)


def test_weights_and_denominator_are_linear_and_a_tensor_denominator_is_taken():
    logits, targets, old, advantages, weights = batch(9, 8, 9)
    base, gradient = run((logits, targets, old, advantages, weights), **CLIP, denominator=4.0)
    scaled, scaled_gradient = run(
        (logits, targets, old, advantages, weights * 3), **CLIP, denominator=torch.tensor(8.0, dtype=torch.float64)
    )
    torch.testing.assert_close(scaled.loss, base.loss * 1.5)
    torch.testing.assert_close(scaled_gradient, gradient * 1.5)


def test_only_the_loss_carries_a_gradient():
    logits, *rest = batch(4, 6, 10)
    found = clipped_policy_loss(logits.requires_grad_(), *rest, **CLIP, denominator=1.0)
    assert found.loss.requires_grad and found.loss.dim() == 0
    assert not (found.logprobs.requires_grad or found.ratio.requires_grad or found.entropy.requires_grad)


@pytest.mark.parametrize("denominator", [0.0, -1.0, float("nan"), torch.tensor(0.0)])
def test_denominators_that_are_not_positive_are_refused(denominator):
    with pytest.raises(ValueError, match="denominator"):
        clipped_policy_loss(*batch(2, 3, 0), **CLIP, denominator=denominator)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (4, torch.tensor([1.0, -0.1]), "loss_mask"),
        (4, torch.tensor([1.0, float("nan")]), "loss_mask"),
        (4, torch.tensor([True, False]), "loss_mask"),
        (3, torch.tensor([1, 2]), "advantages"),
        (3, torch.ones(3), "advantages"),
        (2, torch.ones(2, 1), "old_logprobs"),
        (1, torch.tensor([0, 3]), "targets"),
    ],
)
def test_wrong_tensors_are_refused(place, value, message):
    arguments = list(batch(2, 3, 0))
    arguments[4] = torch.ones(2)
    arguments[place] = value
    with pytest.raises(ValueError, match=message):
        clipped_policy_loss(*arguments, **CLIP, denominator=1.0)


@pytest.mark.parametrize("eps_dual", [1.0, 0.5, float("nan")])
def test_dual_bounds_of_at_most_one_are_refused(eps_dual):
    with pytest.raises(ValueError, match="eps_dual"):
        clipped_policy_loss(*batch(2, 3, 0), **CLIP, eps_dual=eps_dual, denominator=1.0)
