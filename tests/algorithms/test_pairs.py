import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.algorithms.pairs import pair_losses, reward_pairs

REWARDS = st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0]), min_size=1, max_size=8)


@given(REWARDS, st.data())
def test_pairs_are_of_usable_responses_and_the_better_comes_first(rewards, data):
    usable = data.draw(st.lists(st.integers(0, len(rewards) - 1), unique=True).map(sorted))
    gap = data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    rewards_G = np.array(rewards, np.float32)
    every = reward_pairs(rewards_G, usable, pairing="all", least_gap=gap)
    expected = {(i, j) for i in usable for j in usable if rewards[i] > rewards[j] and rewards[i] - rewards[j] >= gap}
    assert set(every) == expected and len(every) == len(expected)
    one = reward_pairs(rewards_G, usable, pairing="best-worst", least_gap=gap)
    assert len(one) == bool(every)
    for better, worse in one:
        assert rewards[better] == max(rewards[i] for i in usable)
        assert rewards[worse] == min(rewards[i] for i in usable)
        assert better == rewards.index(rewards[better], min(i for i in usable if rewards[i] == rewards[better]))


def test_an_unknown_pairing():
    with pytest.raises(ValueError, match="pairing best is not one of"):
        reward_pairs(np.zeros(2), [0, 1], pairing="best", least_gap=0.0)


@given(
    st.lists(st.floats(-200, 200), min_size=1, max_size=6),
    st.sampled_from([0.01, 0.1, 1.0, 5.0]),
    st.sampled_from([0.0, 0.1, 0.4]),
)
def test_losses_and_slopes_against_autograd(margins, beta, smoothing):
    margins_P = torch.tensor(margins, dtype=torch.float64, requires_grad=True)
    log_sigmoid = torch.nn.functional.logsigmoid
    expected = -(1 - smoothing) * log_sigmoid(beta * margins_P) - smoothing * log_sigmoid(-beta * margins_P)
    expected.sum().backward()
    losses, slopes = pair_losses(np.array(margins), beta=beta, label_smoothing=smoothing)
    np.testing.assert_allclose(losses, expected.detach().numpy(), rtol=1e-12, atol=1e-300)
    np.testing.assert_allclose(slopes, -margins_P.grad.numpy(), rtol=1e-9, atol=1e-12)


def test_by_hand():
    losses, slopes = pair_losses(np.array([0.0, 2.0]), beta=0.5, label_smoothing=0.0)
    assert losses == pytest.approx([np.log(2), np.log1p(np.exp(-1))])
    assert slopes == pytest.approx([0.25, 0.5 / (1 + np.e)])
    # without smoothing a large margin asks for nothing; with it, the label may be wrong and the margin is held back
    assert pair_losses(np.array([1e4]), beta=1.0, label_smoothing=0.0)[1][0] == 0
    assert pair_losses(np.array([1e4]), beta=1.0, label_smoothing=0.2)[1][0] == pytest.approx(-0.2)
