import csv

import numpy as np
import pytest

from tools.bench_bookkeeping import DATA_PARALLEL, PROMPT_TOKENS, ModelFreeLearner, measure, run_step, synthetic_groups
from tools.bench_record import write_rows


def test_every_part_of_both_steps_is_measured(tmp_path):
    rows = measure(4, 3, 50)
    assert [row.step for row in rows] == [1, 2]
    for row in rows:
        parts = (row.sampling_s, row.rollout_metrics_s, row.old_policy_s, row.learn_step_s, row.learner_metrics_s)
        assert min(*parts, row.packing_s) > 0 and row.total_s == pytest.approx(row.packing_s + sum(parts))
        assert row.groups_bytes == 4 * 3 * 50 * 12 and row.commit
    write_rows(rows, tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv") as file:
        assert [line["step"] for line in csv.DictReader(file)] == ["1", "2"]


def test_one_rank_packs_its_share_for_scoring_and_for_every_update():
    rng = np.random.default_rng(0)
    groups, length = synthetic_groups(64, 4, 50, rng), PROMPT_TOKENS + 50
    learner = ModelFreeLearner(-rng.random((2, 1000), dtype=np.float32), tokens_per_micro_batch=length)
    run_step(learner, groups, 50)
    # 32 prompts an update
    assert learner.packed_tokens == [64 * 4 * length // DATA_PARALLEL] + [32 * 4 * length // DATA_PARALLEL] * 2
    logprobs = [values for group in groups for values in group.old_logprobs]
    assert [len(values) for values in logprobs] == [50] * 64 * 4 and all(values.base is None for values in logprobs)
