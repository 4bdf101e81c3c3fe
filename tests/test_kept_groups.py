"""Groups that a checkpoint keeps for the next step are trained on only under the settings they were made with."""

import pytest

from dapo_megatron.assemble import group_settings
from dapo_megatron.config import load_recipe
from dapo_megatron.worker import still_fitting
from tests.command_line import RECIPE
from tests.data.test_group_files import group

KEPT = [group(0, [3, 1], scored=True), group(1, [2, 2], scored=True)]
NOTED = {"groups": group_settings(load_recipe(RECIPE))}


@pytest.mark.parametrize(
    "override",
    ["algorithm.overlong_filtering=false", "rollout.samples_per_prompt=6", "rollout.temperature=0.8"],
)
def test_a_changed_setting_drops_them_and_is_named(override):
    groups, lines = still_fitting(KEPT, NOTED, load_recipe(RECIPE, [override]))
    name = override.partition("=")[0]
    assert groups == [] and len(lines) == 1
    assert lines[0].startswith("2 groups") and f"{name}=" in lines[0]
    assert f"({NOTED['groups'][name]} before)" in lines[0]
    assert still_fitting([], NOTED, load_recipe(RECIPE, [override])) == ([], [])


def test_other_settings_leave_them():
    recipe = load_recipe(RECIPE, ["rollout.max_response_length=9", "optimizer.learning_rate=1.0e-6"])
    assert still_fitting(KEPT, NOTED, recipe) == (KEPT, [])


def test_without_a_note_they_are_dropped():
    groups, lines = still_fitting(KEPT, {}, load_recipe(RECIPE))
    assert groups == [] and "unknown before" in lines[0]
