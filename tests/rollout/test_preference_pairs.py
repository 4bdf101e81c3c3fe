import numpy as np

from dapo_megatron.data.completions import NOT_DRAWN
from dapo_megatron.data.preferences import Preference
from dapo_megatron.data.prompts import Prompt
from dapo_megatron.monitoring.step_metrics import rollout_metrics
from dapo_megatron.rollout import preference_pairs
from dapo_megatron.rollout.dynamic_sampling import SampledStep
from dapo_megatron.rollout.preference_pairs import PreferencePairs


def ids(*tokens):
    return np.array(tokens, np.int32)


def pairs(count=5):
    preferences = [Preference(Prompt(i, f"q{i}", ""), f"good {i}", f"bad {i}") for i in range(count)]
    encoded = [(ids(i), ids(*range(i + 1)), ids(7, 8)) for i in range(count)]
    return PreferencePairs(preferences, encoded)


def test_groups_are_the_rows_asked_for():
    drawn = pairs().draw_for_training(np.array([3, 0]), step=4, wave=0)
    assert [(g.prompt_id, g.text, g.step) for g in drawn] == [(3, "q3", 4), (0, "q0", 4)]
    group = drawn[0]
    assert group.responses == ["good 3", "bad 3"]
    assert group.accuracies.tolist() == [True, False] and group.rewards.tolist() == [1.0, -1.0]
    assert [c.tokens.tolist() for c in group.completions] == [[0, 1, 2, 3], [7, 8]]
    assert all((c.policy_versions == NOT_DRAWN).all() and c.finish_reason == "stop" for c in group.completions)
    assert group.reference_logprobs == []


def test_nothing_of_a_file_counts_as_drawn_or_graded():
    groups = pairs().draw_for_training(np.array([3, 0]), step=4, wave=0)
    metrics = rollout_metrics(SampledStep(trained=groups, generated=groups, waves=1))
    assert metrics["tokens/generated"] == metrics["responses/generated"] == 0
    assert metrics["response_length/max"] == 4
    assert not [key for key in metrics if key.startswith(("accuracy/", "reward/", "groups/all_", "histogram/reward"))]
    for completion in (c for g in groups for c in g.completions):
        completion.policy_versions[:] = 0
    metrics = rollout_metrics(SampledStep(trained=groups, generated=groups, waves=1))
    assert (metrics["tokens/generated"], metrics["responses/generated"]) == (4 + 2 + 1 + 2, 4)
    assert (metrics["accuracy/train"], metrics["reward/mean"]) == (0.5, 0.0)


def test_the_reference_is_asked_once_and_in_the_order_of_the_file(monkeypatch):
    monkeypatch.setattr(preference_pairs, "ROWS_SCORED", 2)
    seen = []

    def score(batch):
        seen.append([(p.tolist(), len(r)) for p, r in zip(batch.prompts, batch.responses, strict=True)])
        columns = zip(batch.prompts, batch.responses, strict=True)
        return [np.full(len(r), 10.0 * p[0] + len(r), np.float32) for p, r in columns]

    source = pairs()
    source.keep_reference(score)
    assert [len(part) for part in seen] == [4, 4, 2]
    assert seen[1] == [([2], 3), ([2], 2), ([3], 4), ([3], 2)]
    for group in source.draw_for_training([4, 1], step=0, wave=1):
        row = group.prompt_id
        chosen, rejected = group.reference_logprobs
        assert chosen.tolist() == [10.0 * row + row + 1] * (row + 1) and rejected.tolist() == [10.0 * row + 2] * 2
    assert len(seen) == 3
