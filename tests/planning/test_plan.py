"""Plans of the recipes for GPU nodes: they fit, they are what the documents say, and wrong ones are mended."""

import importlib.util
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from dapo_megatron.config import Recipe, check_recipe, derive_layout, load_recipe
from dapo_megatron.errors import RequestError
from dapo_megatron.planning.activations import chunks_in_flight, kept_bytes
from dapo_megatron.planning.engine import engine_bytes
from dapo_megatron.planning.hardware import CARDS, GIB
from dapo_megatron.planning.memory import plan_memory
from dapo_megatron.planning.moments import compute_bytes
from dapo_megatron.planning.plan import RunPlan, plan_run
from dapo_megatron.planning.search import nearest_fit, with_settings
from dapo_megatron.planning.words import plan_as_json
from dapo_megatron.planning.workload import micro_batches
from dapo_megatron.prepare import planned_architecture

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "gpu"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml") if not path.stem.endswith("base"))
PAPER = "qwen2.5-32b-dapo-paper"


def loaded(name: str, *overrides: str) -> Recipe:
    return load_recipe(FOLDER / f"{name}.yaml", overrides)


def planned(recipe: Recipe, **lengths: float) -> RunPlan:
    return plan_run(recipe, planned_architecture(recipe, folder_needed=False), **lengths)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_its_cards(name):
    recipe = loaded(name)
    check_recipe(recipe, planned_architecture(recipe, folder_needed=False))
    plan = planned(recipe)
    assert plan.fits and plan.devices == recipe.parallel.world
    for stage in plan.memory.stages:
        assert 0 < stage.learn <= plan.memory.card.memory and 0 < stage.rollout <= plan.memory.card.memory


def test_worlds_are_the_nodes_that_names_promise():
    nodes = {name: loaded(name).parallel.world / loaded(name).hardware.gpus_per_node for name in RECIPES}
    assert {nodes[name] for name in RECIPES if name.endswith("8-nodes")} == {8}
    assert nodes[PAPER] == nodes["qwen2.5-32b-dapo-reproduction"] == nodes[f"{PAPER}-h200"] == 16
    assert [nodes[f"qwen2.5-{size}-dapo"] for size in ("0.5b", "1.5b", "7b", "14b", "72b")] == [1, 1, 1, 2, 32]


def test_paper_and_reproduction_differ_where_they_do():
    paper, other = loaded(PAPER), loaded("qwen2.5-32b-dapo-reproduction")
    assert (paper.algorithm.eps_dual, other.algorithm.eps_dual) == (None, 10.0)
    assert (paper.optimizer.warmup_rollout_steps, other.optimizer.warmup_rollout_steps) == (20, 10)
    assert (paper.algorithm.overlong_filtering, other.algorithm.overlong_filtering) == (True, False)
    for recipe in (paper, other):
        assert (recipe.algorithm.eps_low, recipe.algorithm.eps_high) == (0.2, 0.28)
        assert (recipe.rollout.prompts_per_step, recipe.rollout.samples_per_prompt) == (512, 16)
        assert recipe.algorithm.mini_batch_prompts * recipe.rollout.samples_per_prompt == 512
        assert (recipe.rollout.max_response_length, recipe.reward.overlong.cache_length) == (20480, 4096)
        assert recipe.optimizer.learning_rate == 1e-6
    assert other.algorithm.dynamic_sampling.over_sampling * other.rollout.prompts_per_step == 1536


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["parallel.tensor=3"], "parallel.tensor=3 does not divide 40 attention heads"),
        (["parallel.tensor=1", "parallel.pipeline=1", "parallel.sequence=false"], "learning needs"),
        (["learner.recompute=none"], "activations 89.6 GB"),
        (["parallel.pipeline=3"], "parallel.pipeline=3 does not divide 64 layers"),
        (["rollout.gpu_memory_share=0.9"], "use 0.8 or less"),
        (["rollout.gpu_memory_share=0.2"], "for the KV cache"),
        (["learner.offload_optimizer=false"], "beside the learner's state needs"),
        (["parallel.world=8", "learner.offload_optimizer=false"], "beside the learner's state needs"),  # a node alone
    ],
)
def test_wrong_layouts_are_refused_and_the_suggestion_works(overrides, told):
    recipe = loaded(PAPER, *overrides)
    a = planned_architecture(recipe, folder_needed=False)
    try:
        problems = "\n".join(planned(recipe).memory.problems)
    except RequestError as error:
        problems = str(error)
    assert told in problems
    suggestion = nearest_fit(recipe, a)
    if overrides == ["learner.offload_optimizer=false"]:
        assert suggestion == {"learner.offload_optimizer": True}
    if overrides[0] == "rollout.gpu_memory_share=0.2":
        assert suggestion is None or suggestion["rollout.tensor"] == 8
    if suggestion is None:
        return
    assert suggestion and planned(with_settings(recipe, suggestion)).fits


def test_the_search_keeps_what_fits():
    assert nearest_fit(loaded(PAPER), planned_architecture(loaded(PAPER), folder_needed=False)) == {}


def test_memory_counted_by_hand():
    recipe = loaded(PAPER)
    a = planned_architecture(recipe, folder_needed=False)
    layout = derive_layout(recipe, a)
    rows, h, f, q, k, v = 22528, 5120, 27648, 5120, 1024, 152064
    residual = rows // 4 * h * 2
    layer = 4 * residual + rows * (6 * (q + k) + 160) // 4 + rows * f // 4 * 6
    work = rows * 2 * (3 * f // 4 + 2 * h) + 2 * 2 * (f // 4 * h)
    found = compute_bytes(recipe, a, layout, 0, 9)
    assert found.activations == 2 * 32 * residual + layer + work + 2 * residual  # and what was sent to the last stage
    assert (found.logits, found.update) == (0, 0)
    head = rows * h * 2 * 2 + residual + 2048 * (v // 4 + h) * 2
    kept = 32 * residual + 3 * residual  # received; the final norm's input and output
    found = compute_bytes(recipe, a, layout, 1, 9)
    assert layer + work > head and (found.activations, found.logits) == (kept + layer + work, 0)
    bare = with_settings(recipe, {"learner.recompute": "none"})
    assert compute_bytes(bare, a, layout, 1, 9).activations == 32 * layer + work + 3 * residual
    whole = with_settings(bare, {"learner.fused_linear_loss": False})
    found = compute_bytes(whole, a, layout, 1, 9)
    assert found.activations == 32 * layer + 3 * residual  # logits and the layer at work are never there at once
    assert found.logits == rows * v // 4 * 2 + rows * h * 2 * 2 + residual + 2 * (h * v // 4)


def test_a_cpu_keeps_more_than_flash_attention_does():
    recipe = loaded(PAPER, "learner.recompute=none", "model.layer_spec=local")
    a = planned_architecture(recipe, folder_needed=False)
    layout = derive_layout(recipe, a)
    engine, varlen, cpu = (
        plan_memory(recipe, a, layout, attention=way).stages[0].activations
        for way in ("transformer_engine", "varlen", "torch")
    )
    assert engine < varlen < cpu
    assert plan_memory(recipe, a, layout).stages[0].activations == varlen
    rows, h, f, q, k, d, heads = 1000, 512, 2048, 512, 128, 64, 8
    small = replace(a, hidden=h, ffn=f, heads=heads, kv_heads=2, head_dim=d)
    alone = replace(layout, tensor=1, sequence_parallel=False)
    kept = partial(kept_bytes, small, alone, rows, dtype="fp32", attention="torch")
    each = 24 * h + 4 * (4 * q + 2 * k) + 4 * heads + 16 * d + 20 * f
    assert kept(length=500) == rows * each
    assert kept(length=500, again=True) == rows * (24 * h + 4 * (3 * q + 3 * k) + 16 * d + 20 * f)
    cut = replace(alone, context=2)
    masks = 2 * rows * 500 * 5 / 16 * 4  # of four sequences of 500 rows: 5 / 16 of each square
    assert kept_bytes(small, cut, rows, dtype="fp32", attention="torch", length=500) == rows * (each + 12 * k) + masks


def test_only_the_fullest_moment_counts():
    recipe = loaded("qwen2.5-0.5b-dapo", "learner.device=cpu", "learner.tokens_per_micro_batch=22528")
    a = planned_architecture(recipe, folder_needed=False)
    few = with_settings(recipe, {"learner.tokens_per_micro_batch": 64})
    many, alone = (plan_memory(r, a, derive_layout(r, a)).stages[0] for r in (recipe, few))
    assert many.activations and many.logits and not many.update
    assert alone.update == alone.state.gradients and not alone.activations and not alone.logits


def test_engine_memory_counted_by_hand():
    recipe = loaded(PAPER)
    a = planned_architecture(recipe, folder_needed=False)
    engine = engine_bytes(recipe, a, CARDS["h100"])
    assert engine.kv_token == 2 * 64 * 2 * 128 * 2
    assert engine.weights + engine.kv_cache + 3 * GIB == round(0.8 * 79 * GIB)


@pytest.mark.parametrize(
    ("overrides", "workers", "bucket"),
    [
        ((), 7, True),
        (("rollout.engines=1",), 4, True),
        (("parallel.world=8",), 7, False),  # one node: workers copy straight from the weights
        (("resharding.bucket_mib=512", "hardware.gpus_per_node=4"), 3, True),
        (("rollout.placement=disaggregated", "rollout.engines=2"), 0, True),
        (("rollout.servers=[http://10.0.0.1:8000]", "rollout.engines=1"), 0, True),
        (("learner.device=cpu",), 0, False),
    ],
)
def test_what_the_way_into_engines_holds_on_a_card(overrides, workers, bucket):
    recipe = loaded(PAPER, *overrides)
    a = planned_architecture(recipe, folder_needed=False)
    memory = plan_memory(recipe, a, derive_layout(recipe, a))
    held = {name: memory.parts[name] for name in ("contexts", "staging")}
    assert held == {"contexts": workers * 500 << 20, "staging": bucket * recipe.resharding.bucket_mib << 20}
    others = sum(held.values()) + memory.parts["reserve"] + memory.stages[memory.fullest].state.total
    stage = memory.stages[memory.fullest]
    assert stage.learn == others + stage.activations + stage.logits + stage.update
    for name, count in held.items():
        assert not count or f"{name} {count / 1e9:.1f} GB" in "\n".join(
            plan_memory(with_settings(recipe, {"learner.recompute": "none"}), a, derive_layout(recipe, a)).problems
        )


def test_what_an_optimizer_in_host_memory_leaves_to_engines():
    away, beside = (
        planned(loaded(PAPER, f"learner.offload_optimizer={x}")).memory.stages[0] for x in ("true", "false")
    )
    assert beside.rollout - away.rollout == away.state.gradients + away.state.optimizer
    assert (beside.learn, beside.state) == (away.learn, away.state)


def test_context_parallel_ranks_share_rows_and_optimizer_state():
    whole, cut = planned(loaded(PAPER)), planned(loaded(PAPER, "parallel.context=2"))
    for one, two in zip(whole.memory.stages, cut.memory.stages, strict=True):
        assert two.state == one.state  # as many ranks hold the same weights as before
        assert two.activations < 0.75 * one.activations
    assert cut.layout.data * 2 == whole.layout.data
    assert "keys and values between context-parallel ranks" in cut.time.phases["update"].parts
    products = [plan.time.phases["update"].parts["matrix products"] for plan in (whole, cut)]
    assert products[1] == pytest.approx(products[0], rel=0.1)
    assert {rank["context"] for rank in plan_as_json(cut)["ranks"]} == {0, 1}


def test_a_critic_cut_otherwise_is_counted_as_cut():
    critic = ("algorithm.advantage=gae", "rollout.samples_per_prompt=1", "algorithm.dynamic_sampling.enabled=false")
    same, wider = (planned(loaded(PAPER, *critic, *own)) for own in ([], ["critic.parallel.tensor=8"]))
    assert 0 < wider.memory.stages[0].critic < 0.7 * same.memory.stages[0].critic
    assert wider.memory.stages[0].state == same.memory.stages[0].state


def test_micro_batches_kept_follow_the_schedules():
    recipe = loaded(PAPER, "parallel.pipeline=4")
    layout = derive_layout(recipe, planned_architecture(recipe, folder_needed=False))
    assert [chunks_in_flight(layout, stage, 9) for stage in range(4)] == [4, 3, 2, 1]
    assert [chunks_in_flight(layout, stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    recipe = loaded(PAPER, "parallel.pipeline=4", "parallel.virtual_pipeline=2")
    layout = derive_layout(recipe, planned_architecture(recipe, folder_needed=False))
    assert [chunks_in_flight(layout, stage, 8) for stage in range(4)] == [11, 9, 7, 5]


def test_time_follows_the_work():
    plan, longer = planned(loaded(PAPER), response=5000), planned(loaded(PAPER), response=10000)
    for phase in ("rollout", "score", "update"):
        assert longer.time.phases[phase].seconds > plan.time.phases[phase].seconds
    half = planned(loaded(f"{PAPER}-8-nodes"), response=5000)
    assert half.time.phases["score"].seconds == pytest.approx(2 * plan.time.phases["score"].seconds, rel=0.1)
    packs = micro_batches(plan.recipe, plan.layout, 512, plan.work.sequence).count
    assert plan.time.bubble == pytest.approx(1 / (packs + 1))
    assert plan.work.trained_tokens == 8192 * (5000 + 256)
    assert plan.gpu_hours == pytest.approx(1000 * plan.time.seconds * 128 / 3600)
    named = plan.time.bottleneck.split(",")[0]
    assert plan.time.phases[named].seconds == max(phase.seconds for phase in plan.time.phases.values())


def test_json_has_the_same_keys_with_and_without_a_plan():
    found = plan_as_json(planned(loaded(PAPER)))
    assert set(found) == set(plan_as_json(None))
    ranks = found["ranks"]
    assert len(ranks) == 128 and ranks[127] == {
        "rank": 127, "node": 15, "tensor": 3, "context": 0, "data": 15, "pipeline": 1, "layers": [[32, 63]],
    }  # fmt: skip
    assert sum(found["seconds"].values()) == pytest.approx(2 * found["seconds"]["step"])


def test_the_table_of_the_document_is_todays():
    spec = importlib.util.spec_from_file_location("plan_table", ROOT / "tools" / "plan_table.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    text = tool.DOCUMENT.read_text(encoding="utf-8").partition(tool.MARKS[0])[2].partition(tool.MARKS[1])[0]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.strip().splitlines()]
    assert tuple(lines[0]) == tool.COLUMNS and [line[0] for line in lines[2:]] == RECIPES
    for cells in lines[2:]:
        told = dict(zip(tool.COLUMNS, cells, strict=True))
        expected = tool.row(told["recipe"], tool.planned(told["recipe"]))
        assert told == expected, "run python tools/plan_table.py"
