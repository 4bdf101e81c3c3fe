"""A rollout step of a real learner: old log-probs that travel, a reference policy, a KL term in loss and reward."""

import numpy as np
import pytest

from dapo_megatron.algorithms.advantages import group_advantages
from tests.ranks import run_ranks
from tests.tiny_models import write_model

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("model") / "m", "qwen2", tied=True)
    return run_ranks(2, "tests.policy_step_cases:steps", {"model": str(model)})


def test_the_ratio_of_fresh_groups_is_one_and_that_of_kept_groups_is_not(report):
    assert report["first"]["ratio"] == report["fresh"]["ratio"] == 1.0
    assert abs(report["kept"]["ratio"] - 1) > 0.01


def test_the_policy_begins_at_the_reference_and_leaves_it(report):
    first = report["first"]
    assert first["mean"] == first["chosen"] == first["loss"] == 0.0 and first["tokens"] > 0
    fresh = report["fresh"]
    assert fresh["mean"] > 1e-3 and fresh["chosen"] > 1e-3
    # ratio 1, so the KL term is 0.2 times the mean of k2 over the trained tokens of the one mini-batch
    assert fresh["loss"] == pytest.approx(0.2 * fresh["chosen"], rel=1e-4)
    # the policy of kept groups' first step was the reference; the present one, which the loss sees, is not
    kept = report["kept"]
    assert kept["mean"] == kept["chosen"] == 0.0 and kept["loss"] > 1e-3


def test_scoring_with_the_reference_leaves_both_as_they_were(report):
    assert report["reference moved by scoring"] == 0.0 and report["policy moved by swapping"] == 0.0
    assert report["policy from reference"] > 0.01


def test_rows_without_a_trained_token_are_not_forwarded(report):
    assert report["trained rows alone"]


def test_the_reference_is_the_same_at_another_layout(report):
    assert report["reference at another layout"] < 1e-5
    assert report["zeroed weights"] == 0.0


def test_kl_in_the_reward_moves_the_advantages_and_nothing_else(report):
    found = report["in reward"]
    assert found["loss"] == 0.0 and found["ratio"] == 1.0
    expected, penalties = [], []
    for old, reference in zip(found["old"], found["reference"], strict=True):
        charged = [
            0.05 * sum(np.clip(a - b, -20, 20) for a, b in zip(*pair, strict=True))
            for pair in zip(old, reference, strict=True)
        ]
        assert abs(charged[2]) > 1e-4, "a response that is filtered out of the loss is charged too"
        penalties += charged
        advantages = group_advantages(np.array([[1.0, -1.0, -1.0]]) - charged, epsilon=1e-6)[0]
        expected += [a for a, tokens in zip(advantages[:2], old[:2], strict=True) for _ in tokens]
    assert found["penalty"] == pytest.approx(np.mean(penalties), rel=1e-4)
    assert found["advantages"] == pytest.approx(expected, rel=1e-4)


def test_a_moving_average_does_not_stall_in_bf16(report):
    found = report["moving"]["bf16"]
    assert found["fp32 sums"] < 1e-3 and found["bf16 sums"] > 0.5
    assert found["scores with the rounded sums"]


def test_a_periodic_reference_stays_and_then_is_the_policy(report):
    found = report["moving"]["periodic"]
    assert found["between"] == 0.0 and found["stayed"]
    assert found["moved"] == pytest.approx(0.5, rel=1e-2) and found["is the policy"]


def test_how_far_it_moved_counts_every_weight_of_the_model_once(report):
    found = report["moving"]["moved"]
    assert found["expected"] > 0.01
    assert found["tp2pp1"] == pytest.approx(found["expected"], rel=1e-5)
    assert found["tp1pp2"] == pytest.approx(found["expected"], rel=1e-5)


def test_a_resident_reference_scores_as_one_on_the_host(report):
    """bf16 rounds every weight and activation by up to 2⁻⁹ of itself: in this model of 4 layers, whose random logits
    are large, log-probs by about 2⁻⁶."""
    assert report["moving"]["bf16 resident"]["largest"] == 0.0
    assert report["moving"]["bf16 resident"]["policy"] > 0.01
    near = report["moving"]["fp32 resident"]
    assert 0.0 < near["mean"] < 2**-5 * near["size"] and near["largest"] < 2**-2 * near["size"]
    assert near["policy"] > 2 * near["mean"]


def test_a_moving_reference_scores_a_group_in_the_step_that_trains_it(report):
    found = report["moving"]
    assert found["scored anew"] > 1e-4 and found["kept have"] == [0, 0]
