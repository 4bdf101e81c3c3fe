"""The plan of a recipe beside the CUDA allocator's peak, on one real shape. Needs a GPU."""

import gc
from pathlib import Path

import pytest
import torch

from dapo_megatron.config import derive_layout, load_recipe
from dapo_megatron.launch import World
from dapo_megatron.planning.memory import plan_memory
from dapo_megatron.prepare import planned_architecture

FOLDER = Path(__file__).parents[2] / "recipes" / "gpu"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("settings", [[], ["learner.recompute=full", "learner.fused_linear_loss=false"]])
def test_an_update_of_half_a_billion_weights_peaks_where_planned(settings):
    from dapo_megatron.learner.attention import HAVE_VARLEN
    from dapo_megatron.learner.distributed import choose_device, join_world, leave_world
    from dapo_megatron.learner.losses import policy_loss
    from dapo_megatron.learner.model import choose_layer_spec
    from dapo_megatron.learner.parallel_groups import form_groups
    from tools.learner_memory import build, text_batch

    recipe = load_recipe(FOLDER / "qwen2.5-0.5b-dapo.yaml", settings)
    a = planned_architecture(recipe, folder_needed=False)
    layout, device = derive_layout(recipe, a), choose_device("auto", 0)
    budget, longest = recipe.learner.tokens_per_micro_batch, recipe.data.max_prompt_length
    longest += recipe.rollout.max_response_length
    lengths = [(16, size - 16) for size in [*[longest] * (budget // longest), budget % longest] if size > 16]
    batch = text_batch(lengths, a.vocab, 0)
    gc.collect()  # a learner of an earlier test, which its hooks keep in cycles
    join_world(World(0, 1, 0), device=device, time_limit_s=600)
    try:
        form_groups(layout, seed=0, time_limit_s=600)
        learner = build(recipe, a, layout, device)
        loss = policy_loss(
            learner.head, denominator=batch.weight_sum, eps_low=0.2, eps_high=0.28, eps_dual=None,
            entropy_coefficient=0.0,
        )  # fmt: skip
        for _ in range(2):  # the first makes the optimizer's state
            torch.cuda.reset_peak_memory_stats()
            learner.gradients(batch, range(len(batch)), loss)
            learner.step(1e-6, 0.1)
        measured = torch.cuda.max_memory_allocated()
    finally:
        leave_world()
    local = "varlen" if HAVE_VARLEN else "torch"
    spec = choose_layer_spec(recipe.model.layer_spec, device)
    stage = plan_memory(recipe, a, layout, attention=local if spec == "local" else "transformer_engine").stages[0]
    assert stage.learn - stage.reserve == pytest.approx(measured, rel=0.10)
