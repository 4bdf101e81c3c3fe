import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.data.completions import PromptGroup
from dapo_megatron.errors import RequestError
from dapo_megatron.rollout.dynamic_sampling import sample_step


def group(number: int, accuracies: list[bool], rewards: list[float] | None = None) -> PromptGroup:
    given = [1.0 if right else -1.0 for right in accuracies] if rewards is None else rewards
    return PromptGroup(number, "", "", np.zeros(1, np.int32), [], [], np.array(accuracies), np.array(given, np.float32))


class Waves:
    """Hands out prepared groups, as many as asked for, and notes the calls."""

    def __init__(self, accuracies: list[list[bool]]) -> None:
        self.groups = [group(i, a) for i, a in enumerate(accuracies)]
        self.calls: list[tuple[int, int]] = []

    def __call__(self, count: int, wave: int) -> list[PromptGroup]:
        self.calls.append((count, wave))
        start = sum(n for n, _ in self.calls[:-1])
        return self.groups[start : start + count]


ALL, NONE, SOME = [True] * 3, [False] * 3, [True, False, False]
KINDS = st.sampled_from([ALL, NONE, SOME])


def numbers(groups: list[PromptGroup]) -> list[int]:
    return [g.prompt_id for g in groups]


@given(st.lists(KINDS, min_size=40, max_size=40), st.integers(1, 5), st.integers(1, 8))
@settings(deadline=None, max_examples=200)
def test_waves_until_enough_groups_are_mixed(kinds, wanted, max_waves):
    source = Waves(kinds)
    found = sample_step(source, wanted=wanted, enabled=True, max_waves=max_waves, metric="accuracy")
    mixed = [i for i, kind in enumerate(kinds) if kind is SOME]
    needed = mixed[wanted - 1] // wanted + 1 if len(mixed) >= wanted else max_waves
    waves = min(needed, max_waves)
    assert found.waves == waves and source.calls == [(wanted, w) for w in range(waves)]
    assert numbers(found.generated) == list(range(waves * wanted))
    assert numbers(found.trained) == [i for i in mixed if i < waves * wanted][:wanted]


def test_surplus_of_the_last_wave_is_not_trained_on():
    found = sample_step(Waves([ALL, SOME, SOME, SOME]), wanted=2, enabled=True, max_waves=9, metric="accuracy")
    assert (numbers(found.trained), numbers(found.generated), found.waves) == ([1, 2], [0, 1, 2, 3], 2)


def test_without_any_mixed_group_the_step_ends_after_its_waves():
    found = sample_step(Waves([ALL, NONE] * 3), wanted=2, enabled=True, max_waves=3, metric="accuracy")
    assert found.trained == [] and len(found.generated) == 6 and found.waves == 3


def test_switched_off_every_group_of_one_wave_is_trained_on():
    source = Waves([ALL, SOME, NONE])
    found = sample_step(source, wanted=3, enabled=False, max_waves=9, metric="accuracy")
    assert numbers(found.trained) == numbers(found.generated) == [0, 1, 2]
    assert found.waves == 1 and source.calls == [(3, 0)]


def test_the_metric_decides():
    shaped = group(0, ALL, [1.0, 0.5, 1.0])  # all right, yet shaping tells them apart
    level = group(1, SOME, [0.0, 0.0, 0.0])  # mixed, yet every reward the same
    for metric, kept in (("accuracy", [1]), ("reward_std", [0])):
        found = sample_step(lambda *_: [shaped, level], wanted=2, enabled=True, max_waves=1, metric=metric)
        assert numbers(found.trained) == kept
    with pytest.raises(RequestError, match="metric=luck"):
        sample_step(lambda *_: [shaped], wanted=1, enabled=True, max_waves=1, metric="luck")
