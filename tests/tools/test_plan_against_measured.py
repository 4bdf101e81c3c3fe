"""Plans against real updates on the CPU: two small layouts in real ranks, and what the tool draws and counts."""

from dataclasses import replace
from itertools import islice

import pytest

from dapo_megatron.config import check_recipe, derive_layout
from dapo_megatron.errors import RunError
from tools.drawn_layouts import LARGEST, SMALLEST, Case, drawn_cases, planned_bytes
from tools.learner_memory import Allocation, Trace
from tools.plan_against_measured import DOCUMENT, MARKS, compare, markdown, read_rows, run_case

MODEL = {
    "model_type": "qwen3", "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 384, "vocab_size": 1000,
    "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": True,
}  # fmt: skip
BUDGET, LENGTH = 512, 256


def small(parallel: dict, learner: dict, *, dtype: str, packs: int, **algorithm: str) -> Case:
    """A layout of few megabytes whose packs are full."""
    lengths = [(32, LENGTH - 32)] * (packs * BUDGET // LENGTH)
    settings = {
        "run": {"directory": "runs/measured"},
        "model": {"path": "small", "dtype": dtype},
        "parallel": parallel,
        "data": {"train": "unread.jsonl", "max_prompt_length": 32},
        "rollout": {
            "samples_per_prompt": 1, "prompts_per_step": len(lengths), "max_response_length": LENGTH - 32,
            "engine": "hf",
        },
        "algorithm": {"mini_batch_prompts": len(lengths), "dynamic_sampling": {"enabled": False}, **algorithm},
        "learner": {"device": "cpu", "tokens_per_micro_batch": BUDGET, **learner},
    }  # fmt: skip
    return Case(settings, MODEL, lengths)


INTERLEAVED = small({"pipeline": 2, "virtual_pipeline": 2}, {"recompute": "selective"}, dtype="fp32", packs=4)
CONTEXT = small(
    {"context": 2}, {"fused_linear_loss": True, "offload_optimizer": True}, dtype="bf16", packs=1, advantage="gae"
)


@pytest.mark.distributed
@pytest.mark.parametrize("case", [INTERLEAVED, CONTEXT], ids=["interleaved", "context"])
def test_the_plan_tells_the_peak_of_every_rank(case):
    rows = compare(case, run_case(case, time_limit_s=300), seed=0, number=0)
    assert len(rows) == case.layout.world == 2
    for row in rows:
        assert row.measured_parameters == row.planned_parameters
        assert row.measured_gradients == row.planned_gradients
        assert 0.99 * row.planned_optimizer <= row.measured_optimizer <= row.planned_optimizer
        assert 0.99 * row.planned_critic <= row.measured_critic <= row.planned_critic
        assert row.planned_bytes == pytest.approx(row.measured_bytes, rel=0.10), row
        assert row.planned_compute == pytest.approx(row.measured_compute, rel=0.10), row
        assert row.planned_sampling == pytest.approx(row.measured_sampling, abs=2e6), row
        assert row.measured_compute > 0.4 * (row.measured_bytes - row.measured_compute)  # not the state alone is told
        assert row.measured_update_s > 0 and row.planned_update_s > 0
    assert (rows[0].measured_critic > 0) == (case is CONTEXT)


@pytest.mark.distributed
def test_ranks_that_take_too_long_are_ended():
    with pytest.raises(RunError, match=r"p2 v2 failed or took over 0.01 s"):
        run_case(INTERLEAVED, time_limit_s=0.01)


def test_the_draw_is_seeded_and_keeps_to_what_is_allowed():
    cases, again, other = ([*islice(drawn_cases(seed), 3)] for seed in (5, 5, 6))
    assert cases == again and cases != other
    for case in cases:
        recipe, a = case.recipe, case.architecture
        layout = derive_layout(recipe, a)
        check_recipe(recipe, a)
        planned = [planned_bytes(recipe, a, layout, rank) for rank in range(layout.world)]
        assert SMALLEST <= max(planned) <= LARGEST and layout.world <= 4
        assert max(sum(pair) for pair in case.lengths) <= recipe.learner.tokens_per_micro_batch


def test_the_table_of_the_document_is_that_of_the_measured_rows():
    rows = read_rows(DOCUMENT.parent / "benchmarks" / "planning-cpu.csv")
    layouts = {(row.seed, row.layout) for row in rows}
    assert {seed for seed, _ in layouts} == {1, 2, 3} and len(layouts) == 18
    for row in rows:
        assert row.error == pytest.approx(row.planned_bytes / row.measured_bytes - 1, abs=1e-3)
        assert abs(row.error) <= 0.10
    for layout in layouts:
        assert max(row.planned_bytes for row in rows if (row.seed, row.layout) == layout) >= SMALLEST
    text = DOCUMENT.read_text(encoding="utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0]
    assert text.strip() == markdown(rows), "run python tools/plan_against_measured.py --document"


def test_a_trace_counts_what_is_alive():
    steps = [(1, 10, 100), (2, 20, 50), (3, 10, -100), (4, 30, 80), (5, 20, 40), (6, 40, 5), (7, 30, -80)]
    trace = Trace([Allocation(at, address, size, ()) for at, address, size in steps])
    most, held = trace.peak()
    assert most == 150 and sorted(held) == [10, 20]
    later = Trace([replace(step, size=10 * step.size if step.address == 30 else step.size) for step in trace.steps])
    most, held = later.peak()  # address 20 was handed out anew: what lay there had gone
    assert most == 800 + 50 and {step.at for step in held.values()} == {2, 4}
    assert Trace().peak() == (0, {})


def test_windows_are_pairs_of_marks():
    trace = Trace(marks=[(5, "end"), (1, "begin"), (3, "end"), (4, "end"), (7, "begin")])
    assert trace.windows("begin", "end") == [(1, 3)]
