"""`dapo-megatron doctor [RECIPE]`: look, judge, print."""

import json

from dapo_megatron.config import Recipe, derive_layout
from dapo_megatron.doctor.facts import gather
from dapo_megatron.doctor.findings import judge, usable
from dapo_megatron.doctor.machine import Machine, this_machine
from dapo_megatron.doctor.needs import Needs, needs_of
from dapo_megatron.doctor.text import as_json, as_text
from dapo_megatron.prepare import planned_architecture


def examine(recipe: Recipe | None, name: str | None, *, json_wanted: bool, machine: Machine | None = None) -> int:
    """Print what there is and what to make of it; returns 0 where the machine will do, else 1.

    Raises:
        RequestError: the recipe's model folder, or sizes that do not divide.
    """
    needs = Needs()
    if recipe is not None:
        architecture = planned_architecture(recipe, folder_needed=False)
        needs = needs_of(recipe, architecture, derive_layout(recipe, architecture))
    facts = gather(machine or this_machine(), needs.directory)
    findings = judge(facts, needs)
    print(json.dumps(as_json(facts, findings, name)) if json_wanted else as_text(facts, findings, name))
    return 0 if usable(findings) else 1
