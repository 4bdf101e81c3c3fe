"""What a checkpoint remembers of a run comes back as it was, through JSON."""

import json
from dataclasses import MISSING, fields
from types import SimpleNamespace

from dapo_megatron.assemble import Run
from dapo_megatron.config import Recipe


def a_run(**changes) -> Run:
    parts = {f.name: None for f in fields(Run) if f.default is MISSING and f.default_factory is MISSING}
    recipe = Recipe.model_validate({"run": {"directory": "out"}, "model": {"path": "hf"}})
    layout = SimpleNamespace(tensor=2, pipeline=1, context=1, data=1)
    return Run(**{**parts, "recipe": recipe, "layout": layout, **changes})


def test_where_the_entropy_bonus_stands_is_remembered_to_the_bit():
    stands = 0.1 + 0.2 - 0.005
    state = json.loads(json.dumps(a_run(step=4, updates=9, entropy_coefficient=stands).state()))
    resumed = a_run()
    resumed.load_state(state)
    assert (resumed.step, resumed.updates, resumed.entropy_coefficient) == (4, 9, stands)
    del state["entropy_coefficient"]  # a checkpoint written before there was one
    resumed.load_state(state)
    assert resumed.entropy_coefficient is None
