from tools.bench_bookkeeping import measure


def test_every_part_of_a_step_is_measured():
    row = measure(4, 3, 50)
    parts = ("sampling", "rollout_metrics", "old_policy", "learn_step", "learner_metrics")
    assert all(float(row[f"{name}_s"]) >= 0 for name in parts)
    assert float(row["total_s"]) > 0 and row["groups_bytes"] == 4 * 3 * 50 * 12
