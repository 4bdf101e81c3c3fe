"""The KL estimators, and the KL term of the policy loss, by hand; `test_policy_loss` has it beside everything else."""

import math

import pytest
import torch
from dapo_kernels import clipped_policy_loss, kl_estimate

from tests.kernels.test_policy_loss import CLIP, batch, one_row, run

# Δ = l − ref: value and derivative of k2 and k3, by hand; e^2 = 7.38905609893065, e^-0.5 = 0.6065306597126334
KL_VALUES = [
    ("k2", 0.0, 0.0, 0.0),
    ("k2", 0.5, 0.125, 0.5),
    ("k2", -2.0, 2.0, -2.0),
    ("k2", 30.0, 200.0, 0.0),
    ("k3", 0.0, 0.0, 0.0),
    ("k3", 0.5, 0.6065306597126334 - 1 + 0.5, 1 - 0.6065306597126334),
    ("k3", -2.0, 7.38905609893065 - 1 - 2, 1 - 7.38905609893065),
    ("k3", 30.0, math.exp(-20) - 1 + 20, 0.0),
    ("k3", -30.0, math.exp(20) - 1 - 20, 0.0),
]


@pytest.mark.parametrize(("estimator", "delta", "value", "slope"), KL_VALUES)
def test_the_kl_term_by_hand(estimator, delta, value, slope):
    """With A = 0 it stands alone: weight 1, β = 0.5, denominator 4; ∂l/∂z of token 0 is (3/4, −3/4)."""
    arguments = one_row(0.0, -math.log(4.0))
    reference = torch.tensor([-math.log(4.0) - delta], dtype=torch.float64)
    options = {**CLIP, "denominator": 4.0, "kl_coefficient": 0.5, "kl_estimator": estimator}
    found, gradient = run(arguments, reference_logprobs=reference, **options)
    assert found.loss.item() == pytest.approx(0.5 * value / 4, rel=1e-12, abs=1e-15)
    flowing = 0.5 * slope / 4 * 0.75
    wanted = torch.tensor([[flowing, -flowing]], dtype=torch.float64)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-14)


def test_the_three_estimators_by_hand():
    delta = torch.tensor([0.0, 0.5, -2.0, 1e-6, 30.0], dtype=torch.float64, requires_grad=True)
    wanted = {
        "k1": ([0.0, 0.5, -2.0, 1e-6, 20.0], [1.0, 1.0, 1.0, 1.0, 0.0]),
        "k2": ([0.0, 0.125, 2.0, 5e-13, 200.0], [0.0, 0.5, -2.0, 1e-6, 0.0]),
        "k3": (
            [0.0, 0.1065306597126334, 4.38905609893065, 5e-13 - 1e-18 / 6, math.exp(-20) + 19],
            [0.0, 0.3934693402873666, -6.38905609893065, 1e-6 - 5e-13, 0.0],
        ),
    }
    for estimator, (values, slopes) in wanted.items():
        found = kl_estimate(delta, estimator)
        (gradient,) = torch.autograd.grad(found.sum(), delta)
        assert found.tolist() == pytest.approx(values, rel=1e-4, abs=1e-18), estimator
        assert gradient.tolist() == pytest.approx(slopes, rel=1e-9, abs=1e-15), estimator
        assert found.tolist()[:3] == pytest.approx(values[:3], rel=1e-12)


def test_the_kl_term_reaches_clipped_rows_and_ignores_untrained_ones():
    logits, targets, old, _, _ = batch(6, 9, 4, drift=0.0)
    weights = torch.tensor([1.0, 1.0, 1.0, 0.0, 2.0, 1.0], dtype=torch.float64)
    reference = old - 0.7
    reference[3] = float("nan")
    options = {**CLIP, "denominator": 6.0, "kl_coefficient": 0.1, "reference_logprobs": reference}
    found, gradient = run((logits, targets, old - 5, torch.ones_like(old), weights), **options)
    assert found.clipped_high.sum() == 5
    slope = 1 - math.exp(-0.7)
    at_target = gradient.gather(1, targets[:, None]).squeeze(1)
    wanted = weights * 0.1 / 6.0 * slope * (1 - old.exp())
    torch.testing.assert_close(at_target, wanted)
    assert not gradient[3].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_coefficient": 0.1}, "needs reference_logprobs"),
        ({"kl_coefficient": -0.1, "reference_logprobs": torch.zeros(2)}, "must be >= 0"),
        ({"kl_coefficient": float("nan"), "reference_logprobs": torch.zeros(2)}, "must be >= 0"),
        ({"kl_coefficient": 0.1, "reference_logprobs": torch.zeros(3)}, "reference_logprobs must be float"),
        ({"kl_coefficient": 0.1, "reference_logprobs": torch.zeros(2), "kl_estimator": "k1"}, "gradient of k1 is 0"),
        ({"kl_coefficient": 0.1, "reference_logprobs": torch.zeros(2), "kl_estimator": "k4"}, "use 'k2' or 'k3'"),
    ],
)
def test_a_kl_term_that_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        clipped_policy_loss(*batch(2, 3, 0), **CLIP, denominator=1.0, **options)
