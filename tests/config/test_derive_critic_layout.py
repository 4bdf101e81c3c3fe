"""How a critic is cut over the policy's ranks, and sizes that do not divide."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.config import Layout, derive_critic_layout, derive_layout
from dapo_megatron.config.architecture import critic_of
from dapo_megatron.errors import RequestError
from tests.config.test_derive_layout import QWEN25_32B, recipe

POLICY = {"tensor": 8, "pipeline": 4, "virtual_pipeline": 2, "sequence": True, "world": 128}
CRITIC = critic_of(QWEN25_32B)


def layout_of(critic: dict, parallel: dict = POLICY, shape=CRITIC, world: int | None = None) -> Layout:
    settings = recipe(parallel=parallel, algorithm={"advantage": "gae"}, critic={"parallel": critic})
    return derive_critic_layout(settings, shape, world)


def test_what_a_critic_does_not_set_is_the_policys():
    policy = derive_layout(recipe(parallel=POLICY), QWEN25_32B)
    assert layout_of({}) == policy
    assert layout_of({"tensor": 4}) == replace(policy, tensor=4, data=8)
    assert layout_of({}, world=64) == replace(policy, world=64, data=2)


@pytest.mark.parametrize(
    ("critic", "expected"),
    [
        ({"pipeline": 2}, {"tensor": 8, "pipeline": 2, "virtual_pipeline": 1, "data": 8, "sequence_parallel": True}),
        ({"pipeline": 2, "virtual_pipeline": 4}, {"virtual_pipeline": 4, "layers_per_chunk": 8}),
        ({"tensor": 1, "pipeline": 1}, {"data": 128, "sequence_parallel": False, "layers_per_chunk": 64}),
        ({"sequence": False}, {"tensor": 8, "sequence_parallel": False, "virtual_pipeline": 2}),
    ],
)
def test_sizes_of_its_own(critic, expected):
    layout = layout_of(critic)
    assert {name: getattr(layout, name) for name in expected} == expected and layout.world == 128


@pytest.mark.parametrize(
    ("critic", "parallel", "told"),
    [
        ({"tensor": 3}, POLICY, ["critic.parallel.tensor=3 does not divide 40 attention heads; use 1, 2, 4 or 8"]),
        ({"pipeline": 3}, POLICY, ["critic.parallel.pipeline=3 does not divide 64 layers; use 2 or 4"]),
        (
            {"tensor": 4, "pipeline": 1},
            {"tensor": 2, "world": 6},
            [
                "critic.parallel.tensor=4 x critic.parallel.pipeline=1 = 4 does not divide the world of 6 ranks",
                "use a product of 3 or 6, or parallel.world=4",
            ],
        ),
        ({"tensor": 8}, {"tensor": 2}, ["= 8 does not divide the world of 2 ranks; use a product of 2, or", "world=8"]),
        (
            {"pipeline": 1, "virtual_pipeline": 2},
            {},
            ["critic.parallel.virtual_pipeline=2 needs critic.parallel.pipeline > 1", "use virtual_pipeline=1"],
        ),
        ({"tensor": 1, "sequence": True}, POLICY, ["critic.parallel.sequence=true needs critic.parallel.tensor > 1"]),
    ],
)
def test_refusals_name_the_critics_settings(critic, parallel, told):
    with pytest.raises(RequestError) as caught:
        layout_of(critic, parallel)
    for words in told:
        assert words in str(caught.value)
    assert " parallel.tensor" not in str(caught.value)


@given(
    tensor=st.sampled_from([1, 2, 4, 8]), pipeline=st.sampled_from([1, 2, 4, 8, 16]), world=st.integers(1, 40),
)  # fmt: skip
def test_a_critic_uses_every_rank_or_is_refused(tensor, pipeline, world):
    sizes = {"tensor": tensor, "pipeline": pipeline}
    if world % (tensor * pipeline) == 0:
        layout = layout_of(sizes, {}, world=world)
        assert layout.tensor * layout.pipeline * layout.data == world
        return
    with pytest.raises(RequestError, match=f"does not divide the world of {world} ranks"):
        layout_of(sizes, {}, world=world)
