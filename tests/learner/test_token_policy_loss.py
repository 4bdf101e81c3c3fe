"""A registered policy loss inside the learner: the same as the fused clip where it is the clip, and errors in words."""

import numpy as np
import pytest
import torch

from dapo_megatron.algorithms.registry import LossMethod, TokenLosses, policy_losses
from dapo_megatron.data.packing import pack
from dapo_megatron.errors import RunError
from dapo_megatron.learner.losses import Head, policy_loss, token_policy_loss
from tests.learner.batches import normal, random_batch

VOCAB, HIDDEN = 100, 16
SETTINGS = {
    "eps_low": 0.2, "eps_high": 0.28, "eps_dual": 2.0, "denominator": 17.0, "entropy_coefficient": 0.05,
    "kl_coefficient": 0.3, "kl_estimator": "k3",
}  # fmt: skip


@pytest.fixture(scope="module")
def packed():
    batch = random_batch([(3, 40), (5, 14), (2, 45)], seed=4, old=(-4.5, 1.5))
    generator = np.random.default_rng(1)
    batch.reference_logprobs = [values + normal(generator, values) for values in batch.old_logprobs]
    batch.loss_weights = [w * 0.0 if i == 1 else w * (0.5 + i) for i, w in enumerate(batch.loss_weights)]
    return pack(batch, range(3), length=112)


def head(weight=None):
    return Head(VOCAB, 0.9, None, implementation="torch", output_weight=weight)


def computed(loss, output, packed):
    leaf = output.clone().requires_grad_()
    value, sums = loss.compute(leaf * 1.0, packed)  # the op takes the memory of what it is given
    value.backward()
    return value.detach(), sums, leaf.grad


@pytest.mark.parametrize("fused_linear", [False, True])
def test_the_registered_clip_is_the_fused_clip(packed, fused_linear):
    torch.manual_seed(0)
    weight = torch.randn(VOCAB, HIDDEN) / 4 if fused_linear else None
    output = torch.randn(packed.tokens_T.numel(), HIDDEN if fused_linear else VOCAB)
    fused = computed(policy_loss(head(weight), **SETTINGS), output, packed)
    rows = computed(token_policy_loss(head(weight), policy_losses()["clip"], **SETTINGS), output, packed)
    for ours, theirs in zip(rows, fused, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours.dtype), rtol=2e-5, atol=1e-6)
    assert min(fused[1].tolist()[1:]) > 0, "every clip and the KL term occur"


def test_padding_alone_is_a_loss_of_zero_whatever_the_method_expects(packed):
    batch = random_batch([(3, 9)], seed=4)
    empty = pack(batch, [], length=8)

    def no_tokens(tokens):
        raise AssertionError("a method is not asked about nothing")

    loss = token_policy_loss(head(), method(no_tokens), denominator=3.0)
    value, sums, gradient = computed(loss, torch.randn(8, VOCAB), empty)
    assert float(value) == 0 and not sums.any() and not gradient.any()


def method(function) -> LossMethod:
    return LossMethod("mine", "", function, ("token-mean",), "", False)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda tokens: tokens.logprobs_N.sum(), ["returned a tensor []", "a loss a token, [85]"]),
        (lambda tokens: [0.0] * 85, ["returned [0.0"]),
        (lambda tokens: tokens.advantages_N, ["without a gradient"]),
        (lambda tokens: TokenLosses(tokens.advantages_N), ["without a gradient"]),
        (lambda tokens: tokens.nothing, ["AttributeError", "test_token_policy_loss.py"]),
    ],
)
def test_what_a_method_does_wrong_is_told(packed, function, words):
    loss = token_policy_loss(head(), method(function), denominator=3.0)
    with pytest.raises(RunError) as caught:
        loss.compute(torch.randn(packed.tokens_T.numel(), VOCAB, requires_grad=True) * 1.0, packed)
    assert all(word in str(caught.value) for word in ["algorithm.policy_loss=mine", *words]), caught.value
