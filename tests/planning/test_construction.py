"""What the planner counts is what megatron builds: real modules of the recipes for GPUs, without memory behind them."""

import itertools
import json
import subprocess
import sys
import time
from math import prod
from pathlib import Path

import pytest

from dapo_megatron.config import derive_layout, load_recipe
from dapo_megatron.config.architecture import critic_of
from dapo_megatron.planning.weights import chunk_parameters, model_parameters, state_bytes
from dapo_megatron.prepare import planned_architecture
from dapo_megatron.resharding.hf_layout import canonical_tensors
from tests.ranks import ROOT

FOLDER = ROOT / "recipes" / "gpu"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.endswith("base"))

# what recipes do not have: tied embeddings and a critic over stages, interleaved chunks, whole optimizers, fp32; sizes
# of data parallelism that divide nothing evenly
OTHERS = [
    ("qwen2.5-0.5b-dapo", ["parallel.tensor=2", "parallel.pipeline=2", "parallel.world=12"], False),
    ("qwen2.5-0.5b-dapo", ["parallel.pipeline=2", "parallel.virtual_pipeline=3", "parallel.world=14"], False),
    ("qwen2.5-0.5b-dapo", ["parallel.tensor=2", "parallel.pipeline=2", "parallel.world=20"], True),
    ("qwen2.5-0.5b-dapo", ["optimizer.distributed=false", "parallel.world=3"], False),
    ("qwen3-8b-high-entropy-20k", ["model.dtype=fp32", "parallel.tensor=1", "parallel.sequence=false"], False),
]


def distinct() -> list[tuple[str, list[str], bool]]:
    """Recipes whose weights and layouts differ: responses of 20k and of 29k tokens have the same modules."""
    seen = {}
    for name in RECIPES:
        recipe = load_recipe(FOLDER / f"{name}.yaml")
        seen.setdefault((recipe.model.architecture, repr(recipe.parallel)), (name, [], False))
    return list(seen.values())


PAPER = ("qwen2.5-32b-dapo-paper", [], False)
SPECS = ("transformer_engine", "local")


@pytest.fixture(scope="module", params=["paper", pytest.param("all", marks=pytest.mark.slow)])
def constructed(request: pytest.FixtureRequest) -> list[tuple[tuple[str, list[str], bool, str], dict]]:
    cases = [(*case, spec) for case in ([PAPER] if request.param == "paper" else distinct()) for spec in SPECS]
    cases += [(*case, SPECS[i % 2]) for i, case in enumerate(OTHERS)]
    asked = [
        {"recipe": str(FOLDER / f"{name}.yaml"), "overrides": overrides, "critic": critic, "spec": spec}
        for name, overrides, critic, spec in cases
    ]
    command = [sys.executable, "-W", "ignore", "-m", "tests.planning.construction"]
    started = time.perf_counter()
    done = subprocess.run(
        command, cwd=ROOT, input=json.dumps(asked), capture_output=True, text=True, timeout=800, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    print(f"{len(cases)} cases in {time.perf_counter() - started:.1f} s")
    return list(zip(cases, json.loads(done.stdout), strict=True))


def test_bytes_of_weights_gradients_and_optimizer_are_megatrons(constructed):
    for (name, overrides, critic, spec), found in constructed:
        recipe = load_recipe(FOLDER / f"{name}.yaml", overrides)
        a = planned_architecture(recipe, folder_needed=False)
        a = critic_of(a) if critic else a
        layout = derive_layout(recipe, a)
        assert len(found["positions"]) == layout.tensor * layout.pipeline
        for position in found["positions"]:
            options = {"dtype": recipe.model.dtype, "distributed": recipe.optimizer.distributed, "spec": spec}
            state, optimizer = state_bytes(a, layout, position["pipeline"], **options)
            assert position["parameters"] == state.parameters, (name, position)
            assert position["gradients"] == state.gradients, (name, position)
            assert position["optimizer"] == optimizer[position["data"]] <= state.optimizer, (name, position)


def test_the_shards_of_all_positions_make_hugging_faces_model(constructed):
    for (name, overrides, critic, _), found in constructed:
        a = planned_architecture(load_recipe(FOLDER / f"{name}.yaml", overrides), folder_needed=False)
        shapes = canonical_tensors(critic_of(a) if critic else a)
        assert found["whole"] == sum(prod(shape) for shape in shapes.values()), name
    sizes = {case[0]: found["whole"] for case, found in constructed if not case[1]}
    assert sizes["qwen2.5-32b-dapo-paper"] == 32_763_876_352  # the published model's


def test_a_token_passes_all_weights_but_embedding_and_vectors():
    for name, spec in itertools.product(RECIPES, SPECS):
        recipe = load_recipe(FOLDER / f"{name}.yaml", ["parallel.tensor=1", "parallel.sequence=false"])
        a = planned_architecture(recipe, folder_needed=False)
        layout = derive_layout(recipe, a)
        stages = range(layout.pipeline * layout.virtual_pipeline)
        matrices = [p for stage in stages for p in chunk_parameters(a, layout, stage, spec) if len(p.shape) == 2]
        passed = sum(p.elements for p in matrices) - (0 if a.tied else a.vocab * a.hidden)
        assert model_parameters(a) == passed, name


def test_recipes_are_found():
    assert len(RECIPES) == 17 and Path(FOLDER / "base.yaml").is_file()
