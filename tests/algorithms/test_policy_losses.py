"""Every policy loss and its gradient against formulas written out token by token in fp64."""

import numpy as np
import pytest
import torch
from dapo_kernels.policy_loss import loss_of_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.algorithms.registry import TokenBatch, policy_losses

EPS = {"eps_low": 0.2, "eps_high": 0.28}


@st.composite
def token_batches(draw):
    """Sequences of trained tokens; log-ratios from rounding to beyond the clamp."""
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=4).filter(sum))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    count = sum(lengths)
    logprobs = -rng.exponential(1.0, count)
    gap = rng.normal(size=count) * rng.choice([0.1, 1.0, 12.0], size=count)
    return {
        "logprobs_N": logprobs,
        "entropy_N": rng.exponential(1.0, count),
        "old_logprobs_N": logprobs - gap,
        "advantages_N": rng.normal(size=count),
        "penalties_N": rng.choice([0.0, 1.0, 0.5], size=count),
        "loss_weights_N": rng.uniform(0.5, 1.5, size=count),
        "sequences_N": np.repeat(np.arange(len(lengths)), lengths),
    }


def computed(name, arrays, **choices):
    """(losses, gradient of Σ w·loss in the log-probs, TokenLosses)."""
    tensors = {key: torch.from_numpy(value) for key, value in arrays.items()}
    tensors["logprobs_N"].requires_grad_()
    tokens = TokenBatch(**tensors, sequences=int(arrays["sequences_N"].max()) + 1, **(EPS | choices))
    found = policy_losses()[name].compute(tokens)
    (tokens.loss_weights_N * found.losses_N).sum().backward()
    return found.losses_N.detach().numpy(), tensors["logprobs_N"].grad.numpy(), found


def tokens_of(arrays):
    keys = ("logprobs_N", "old_logprobs_N", "advantages_N", "loss_weights_N")
    return zip(*(arrays[key] for key in keys), strict=True)


def expected_clip(arrays, dual=None):
    losses, gradient = [], []
    for new, old, a, w in tokens_of(arrays):
        r = np.exp(np.clip(new - old, -20, 20))
        bounded = min(max(r, 0.8), 1.28)
        value, slope = -r * a, -r * a * (abs(new - old) < 20)
        if -bounded * a > value:
            value, slope = -bounded * a, 0.0
        if dual is not None and a < 0 and -dual * a < value:
            value, slope = -dual * a, 0.0
        losses.append(value)
        gradient.append(w * slope)
    return np.array(losses), np.array(gradient)


def expected_gspo(arrays):
    losses, gradient = np.zeros(len(arrays["logprobs_N"])), np.zeros(len(arrays["logprobs_N"]))
    for sequence in set(arrays["sequences_N"].tolist()):
        rows = np.flatnonzero(arrays["sequences_N"] == sequence)
        mean = np.mean(arrays["logprobs_N"][rows] - arrays["old_logprobs_N"][rows])
        s = np.exp(np.clip(mean, -20, 20))
        for t in rows:
            a = arrays["advantages_N"][t]
            losses[t] = max(-s * a, -min(max(s, 0.8), 1.28) * a)
            if losses[t] == -s * a and abs(mean) < 20:
                gradient[rows] += arrays["loss_weights_N"][t] * -s * a / len(rows)
    return losses, gradient


def expected_cispo(arrays, lower):
    losses, gradient = [], []
    for new, old, a, w in tokens_of(arrays):
        weight = min(np.exp(np.clip(new - old, -20, 20)), 1.28)
        weight = max(weight, 0.8) if lower else weight
        losses.append(-weight * a * new)
        gradient.append(-w * weight * a)
    return np.array(losses), np.array(gradient)


def expected_kl_cov(arrays):
    losses, gradient = [], []
    for (new, old, a, w), beta in zip(tokens_of(arrays), arrays["penalties_N"], strict=True):
        r = np.exp(np.clip(new - old, -20, 20))
        losses.append(-r * a + beta * abs(new - old))
        gradient.append(w * (-r * a * (abs(new - old) < 20) + beta * np.sign(new - old)))
    return np.array(losses), np.array(gradient)


def expected_weighted(arrays):
    return (
        -arrays["advantages_N"] * arrays["logprobs_N"],
        -arrays["loss_weights_N"] * arrays["advantages_N"],
    )


CASES = {
    "clip": ({}, expected_clip),
    "clip, dual": ({"eps_dual": 3.0}, lambda arrays: expected_clip(arrays, 3.0)),
    "gspo": ({}, expected_gspo),
    "cispo": ({}, lambda arrays: expected_cispo(arrays, False)),
    "cispo, lower": ({"clips_low": True}, lambda arrays: expected_cispo(arrays, True)),
    "kl-cov": ({}, expected_kl_cov),
    "dpo": ({}, expected_weighted),  # advantages are slopes of the pairs' loss
}


@pytest.mark.parametrize("case", CASES)
@settings(max_examples=60, deadline=None)
@given(arrays=token_batches())
def test_loss_and_gradient_are_those_of_the_formula(case, arrays):
    choices, expected = CASES[case]
    losses, gradient, _ = computed(case.partition(",")[0], arrays, **choices)
    wanted, slope = expected(arrays)
    np.testing.assert_allclose(losses, wanted, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(gradient, slope, rtol=1e-9, atol=1e-12)


def test_every_built_in_loss_has_a_case():
    assert {case.partition(",")[0] for case in CASES} >= {
        name for name, method in policy_losses().items() if "algorithms" in method.compute.__module__
    }


@settings(max_examples=30, deadline=None)
@given(arrays=token_batches())
def test_clip_is_the_fused_loss_on_rows(arrays):
    losses, gradient, found = computed("clip", arrays, eps_dual=3.0)
    logprobs = torch.from_numpy(arrays["logprobs_N"]).requires_grad_()
    rows = [torch.from_numpy(arrays[k]) for k in ("entropy_N", "old_logprobs_N", "advantages_N", "loss_weights_N")]
    fused = loss_of_rows(logprobs, *rows, **EPS, eps_dual=3.0, denominator=2.0, entropy_coefficient=0.0)
    fused.loss.backward()
    assert float(fused.loss.detach()) == pytest.approx(
        float((arrays["loss_weights_N"] * losses).sum() / 2), rel=1e-9, abs=1e-9
    )
    np.testing.assert_allclose(logprobs.grad.numpy() * 2, gradient, rtol=1e-9, atol=1e-12)
    for ours, theirs in (
        (found.clipped_low_N, fused.clipped_low),
        (found.clipped_high_N, fused.clipped_high),
        (found.clipped_dual_N, fused.clipped_dual),
    ):
        assert torch.equal(ours, theirs)


def test_a_policy_that_has_not_moved_has_no_kl_cov_penalty_whatever_rounding_says():
    arrays = {key: np.zeros(2) for key in ("logprobs_N", "entropy_N", "old_logprobs_N", "advantages_N")}
    arrays |= {"penalties_N": np.ones(2), "loss_weights_N": np.ones(2), "sequences_N": np.array([0, 0])}
    arrays["old_logprobs_N"] = np.array([3e-7, -3e-7])
    assert not computed("kl-cov", arrays)[1].any()


def test_clip_counts_of_sequences_count_their_tokens():
    arrays = {key: np.zeros(3) for key in ("logprobs_N", "entropy_N", "penalties_N")}
    arrays |= {"loss_weights_N": np.ones(3), "sequences_N": np.array([0, 0, 1]), "advantages_N": np.ones(3)}
    arrays["old_logprobs_N"] = np.array([-2.0, 0.0, 0.0])
    found = computed("gspo", arrays)[2]
    assert found.clipped_high_N.tolist() == [True, True, False] and not found.clipped_low_N.any()
    np.testing.assert_allclose(found.ratio_N, [np.e, np.e, 1.0])
