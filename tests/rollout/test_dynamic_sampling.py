import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from dapo_megatron.config.algorithm import DynamicSampling
from dapo_megatron.data.completions import PromptGroup
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
    found = sample_step(source, DynamicSampling(max_waves=max_waves, adaptive=False), wanted=wanted)
    mixed = [i for i, kind in enumerate(kinds) if kind is SOME]
    needed = mixed[wanted - 1] // wanted + 1 if len(mixed) >= wanted else max_waves
    waves = min(needed, max_waves)
    assert found.waves == waves and source.calls == [(wanted, w) for w in range(waves)]
    assert numbers(found.generated) == list(range(waves * wanted))
    assert numbers(found.trained) == [i for i in mixed if i < waves * wanted][:wanted]


def test_surplus_of_the_last_wave_is_not_trained_on():
    found = sample_step(Waves([ALL, SOME, SOME, SOME]), DynamicSampling(keep_surplus=False, adaptive=False), wanted=2)
    assert (numbers(found.trained), numbers(found.generated), found.waves) == ([1, 2], [0, 1, 2, 3], 2)


def test_without_any_mixed_group_the_step_ends_after_its_waves():
    found = sample_step(Waves([ALL, NONE] * 3), DynamicSampling(max_waves=3), wanted=2)
    assert found.trained == [] and len(found.generated) == 6 and (found.waves, found.shortfall) == (3, 2)


def test_switched_off_every_group_of_one_wave_is_trained_on():
    source = Waves([ALL, SOME, NONE])
    found = sample_step(source, DynamicSampling(enabled=False), wanted=3)
    assert numbers(found.trained) == numbers(found.generated) == [0, 1, 2]
    assert found.waves == 1 and source.calls == [(3, 0)]


def test_the_metric_decides():
    shaped = group(0, ALL, [1.0, 0.5, 1.0])  # all right, yet shaping tells them apart
    level = group(1, SOME, [0.0, 0.0, 0.0])  # mixed, yet every reward the same
    for metric, kept in (("accuracy", [1]), ("reward_std", [0])):
        found = sample_step(lambda *_: [shaped, level], DynamicSampling(max_waves=1, metric=metric), wanted=2)
        assert numbers(found.trained) == kept


def test_surplus_is_kept_and_trained_on_first():
    first = sample_step(
        Waves([SOME, ALL, SOME, SOME, SOME, SOME]), DynamicSampling(over_sampling=3, adaptive=False), wanted=2
    )
    assert (numbers(first.trained), numbers(first.kept)) == ([0, 2], [3, 4, 5])
    source = Waves([SOME] * 9)
    second = sample_step(source, DynamicSampling(), wanted=2, step=1, surplus=first.kept)
    assert (numbers(second.trained), numbers(second.kept)) == ([3, 4], [5])
    assert (second.reused, second.generated, source.calls, second.waves) == (2, [], [], 0)
    third = sample_step(source, DynamicSampling(), wanted=2, step=1, surplus=second.kept)
    assert (numbers(third.trained), third.reused, source.calls) == ([5, 0], 1, [(1, 0)])


def test_surplus_that_is_too_old_is_dropped_and_counted():
    old, young = group(7, SOME), group(8, SOME)
    old.step, young.step = 3, 4
    found = sample_step(Waves([SOME] * 3), DynamicSampling(max_age=2), wanted=2, step=6, surplus=[old, young])
    assert (numbers(found.trained), found.aged, found.reused) == ([8, 0], 1, 1)


def test_an_adaptive_wave_asks_for_what_is_missing():
    source = Waves([ALL, SOME, ALL, ALL, SOME, ALL, SOME, SOME, SOME, SOME])
    found = sample_step(source, DynamicSampling(over_sampling=2), wanted=3, acceptance=0.5)
    assert source.calls == [(6, 0), (2, 1)]
    assert (numbers(found.trained), numbers(found.kept)) == ([1, 4, 6], [7])
    assert found.acceptance == (0.5 + 4 / 8) / 2


@given(st.lists(KINDS, min_size=400, max_size=400), st.integers(1, 6), st.floats(1, 3), st.integers(1, 4))
@settings(deadline=None, max_examples=100)
def test_no_mixed_group_is_wasted(kinds, wanted, over_sampling, max_age):
    """Mixed groups generated = trained + kept + aged, over any number of steps."""
    rules, source = DynamicSampling(over_sampling=over_sampling, max_age=max_age, max_waves=2), Waves(kinds)
    surplus, acceptance = [], 1.0
    trained = aged = mixed = 0
    for step in range(5):

        def generate(count, wave, step=step):
            groups = source(count, wave)
            for one in groups:
                one.step = step
            return groups

        found = sample_step(generate, rules, wanted=wanted, step=step, surplus=surplus, acceptance=acceptance)
        surplus, acceptance = found.kept, found.acceptance
        mixed += sum(bool(g.accuracies.any() and not g.accuracies.all()) for g in found.generated)
        trained, aged = trained + len(found.trained), aged + found.aged
        assert len(found.trained) + found.shortfall == wanted
        assert mixed == trained + aged + len(surplus)
