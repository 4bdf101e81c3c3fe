import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.algorithms.mini_batch import batch_of_groups
from dapo_megatron.algorithms.statistics import covariance, token_statistics
from dapo_megatron.data.completions import Completion, PromptGroup


def by_hand(advantages, logprobs):
    a, p = np.asarray(advantages, np.float64), np.asarray(logprobs, np.float64)
    cov = np.sort((a - a.mean()) * (p - p.mean()))[::-1]
    return cov.mean(), cov[: max(1, int(0.002 * len(cov)))].mean()


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 99))
def test_against_float64(count, seed):
    generator = np.random.default_rng(seed)
    advantages = generator.choice([-1.5, 0.5, 2.0], count).astype(np.float32)
    logprobs = -generator.exponential(1.0, count).astype(np.float32)
    cuts = sorted(generator.integers(0, count + 1, 3))  # however the tokens are spread over sequences
    parts = list(zip(np.split(advantages, cuts), np.split(logprobs, cuts), strict=True))
    mean, top = covariance(parts)
    expected = by_hand(advantages, logprobs)
    assert (mean, top) == (pytest.approx(expected[0], abs=1e-5), pytest.approx(expected[1], rel=1e-4, abs=1e-5))


def test_the_inputs_are_left_alone_and_no_token_is_nothing():
    advantages, logprobs = np.float32([1.0, -1.0]), np.float32([-0.5, -1.5])
    assert covariance([(advantages, logprobs)]) == (0.5, 0.5)
    assert advantages.tolist() == [1.0, -1.0] and logprobs.tolist() == [-0.5, -1.5]
    assert covariance([]) == covariance([(advantages[:0], logprobs[:0])]) == (0.0, 0.0)


@pytest.mark.parametrize("order", ["random", "rising", "falling", "periodic"])
def test_the_top_of_many_tokens_is_exact(order):
    """More tokens than are looked at to guess where the top begins, and orders that mislead the guess."""
    generator = np.random.default_rng(0)
    values = generator.standard_normal(3_000_000).astype(np.float32)
    values = {"random": values, "rising": np.sort(values), "falling": np.sort(values)[::-1].copy()}.get(order, values)
    if order == "periodic":  # every third value, just those that are looked at, is larger than all others
        values[::3] += 20
    advantages = np.ones_like(values)
    advantages[: len(values) // 2] = -1
    found = covariance(list(zip(np.array_split(advantages, 5), np.array_split(values, 5), strict=True)))
    assert found == pytest.approx(by_hand(advantages, values), rel=1e-3, abs=1e-5)


def scored_group(generator, prompt: int, lengths: list[int], reasons: list[str]) -> PromptGroup:
    """Random log-probs of engine and learner, and entropies; response i is right when i is even."""

    def drawn():
        return [-generator.exponential(1.0, n).astype(np.float32) for n in lengths]

    completions = [
        Completion(i, np.zeros(n, np.int32), logprobs, reason, np.zeros(n, np.int32))
        for i, (n, logprobs, reason) in enumerate(zip(lengths, drawn(), reasons, strict=True))
    ]
    rewards = np.float32([1.0 if i % 2 == 0 else -1.0 for i in range(len(lengths))])
    return PromptGroup(
        0, "", "", np.zeros(prompt, np.int32), completions, rewards=rewards, old_logprobs=drawn(), entropies=drawn()
    )


def test_statistics_of_the_trained_tokens_alone():
    generator = np.random.default_rng(3)
    groups = [scored_group(generator, 2, [5, 3], ["stop", "length"]), scored_group(generator, 4, [2, 7], ["stop"] * 2)]
    batch = batch_of_groups(groups, overlong_filtering=True, advantage_epsilon=1e-6)
    found = token_statistics(batch, groups)
    kept = [(g, i) for g in groups for i, c in enumerate(g.completions) if c.finish_reason == "stop"]
    old = np.concatenate([g.old_logprobs[i] for g, i in kept]).astype(np.float64)
    gap = old - np.concatenate([g.completions[i].logprobs for g, i in kept])
    advantages = np.concatenate([np.full(len(g.old_logprobs[i]), 1.0 if i == 0 else -1.0) for g, i in kept]) / 2**0.5
    assert found.tokens == 14
    assert found.entropy == pytest.approx(np.concatenate([g.entropies[i] for g, i in kept]).mean(dtype=np.float64))
    assert found.probability == pytest.approx(np.exp(old).mean())
    assert (found.log_ratio, found.log_ratio_abs) == pytest.approx((gap.mean(), np.abs(gap).mean()))
    assert found.log_ratio_abs_max == np.abs(gap).max()
    assert (found.covariance, found.covariance_top) == pytest.approx(by_hand(advantages, old), rel=1e-5)


def test_nothing_trained_and_not_a_number():
    generator = np.random.default_rng(4)
    groups = [scored_group(generator, 1, [2, 2], ["length"] * 2)]
    batch = batch_of_groups(groups, overlong_filtering=True, advantage_epsilon=1e-6)
    assert token_statistics(batch, groups) is None
    groups[0].completions[0].logprobs[1] = np.nan
    batch = batch_of_groups(groups, overlong_filtering=False, advantage_epsilon=1e-6)
    found = token_statistics(batch, groups)
    assert np.isnan([found.log_ratio, found.log_ratio_abs, found.log_ratio_abs_max]).all()
    assert np.isfinite([found.entropy, found.probability]).all()


def test_a_token_without_a_weight_does_not_count():
    groups = [scored_group(np.random.default_rng(5), 1, [4, 2], ["stop"] * 2)]
    batch = batch_of_groups(groups, overlong_filtering=True, advantage_epsilon=1e-6)
    batch.loss_weights[0] = np.float32([0, 0.5, 0, 2])
    found = token_statistics(batch, groups)
    entropies = [groups[0].entropies[0][[1, 3]], groups[0].entropies[1]]
    assert found.tokens == 4 and found.entropy == pytest.approx(np.concatenate(entropies).mean(dtype=np.float64))
