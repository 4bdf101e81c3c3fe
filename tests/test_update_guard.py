"""Which updates are skipped, that a resumed run decides alike, and what a run tells and does about it."""

import json
import math
import re
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dapo_megatron.config.load import build_recipe
from dapo_megatron.config.optimizer import Guard
from dapo_megatron.errors import FINAL, RequestError
from dapo_megatron.learner.learner import GradientNorm
from dapo_megatron.monitoring import alerts_for, read_metrics
from dapo_megatron.update_guard import UpdateGuard
from tests.command_line import RECIPE, SMALL, run_command
from tests.resume.test_state import a_run

SETTINGS = Guard(norm_spike=3.0, loss_spike=4.0, window=6, most_skips=2, among=3)
NUMBERS = st.one_of(st.floats(0.01, 100.0), st.sampled_from([math.nan, math.inf]))


def judged(guard: UpdateGuard, updates: list[tuple[float, float]], first: int = 0) -> list[bool]:
    return [guard.judge(loss, GradientNorm(norm), first + i) is not None for i, (loss, norm) in enumerate(updates)]


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=30))
def test_the_rule_is_the_one_that_is_written_down(updates):
    norms, losses, expected = [], [], []
    for loss, norm in updates:
        skip = not (math.isfinite(loss) and math.isfinite(norm))
        if not skip and len(norms) >= 3:
            last, middle = norms[-6:], median(losses[-6:])
            spread = median(abs(one - middle) for one in losses[-6:])
            skip = norm > 3.0 * median(last) or (spread > 0 and abs(loss - middle) > 4.0 * spread)
        expected.append(skip)
        if not skip:
            norms.append(norm)
            losses.append(loss)
    assert judged(UpdateGuard(SETTINGS, "policy"), updates) == expected


@given(st.lists(st.tuples(NUMBERS, NUMBERS), max_size=30), st.integers(0, 30))
def test_a_resumed_run_takes_the_same_decisions(updates, at):
    whole = UpdateGuard(SETTINGS, "policy")
    expected = judged(whole, updates)
    before = a_run()
    before.guards["policy"] = UpdateGuard(SETTINGS, "policy")
    judged(before.guards["policy"], updates[:at])
    after = a_run()
    after.guards["policy"] = UpdateGuard(SETTINGS, "policy")
    after.load_state(json.loads(json.dumps({**before.state(), "step": 3, "updates": 4}, allow_nan=False)))
    resumed = after.guards["policy"]
    assert judged(resumed, updates[at:], first=at) == expected[at:]
    assert (resumed.exhausted, resumed.total) == (whole.exhausted, whole.total)


def test_so_many_skips_among_the_latest_updates_end_the_run():
    good, bad = (0.5, 1.0), (0.5, math.inf)
    guard = UpdateGuard(SETTINGS, "policy")
    ends = []
    for update in (bad, good, good, bad, good, bad):
        judged(guard, [update], first=len(ends))
        ends.append(guard.exhausted)
    assert ends == [False, False, False, False, False, True]
    assert guard.first_of_latest == 3


def test_what_is_not_finite_is_only_skipped_where_the_recipe_says_so():
    ends = UpdateGuard(Guard(non_finite=False), "policy")
    assert ends.judge(0.5, GradientNorm(math.nan), 1) is None
    told = UpdateGuard(Guard(), "policy").judge(0.5, GradientNorm(math.nan, "a row of logits holds a NaN"), 1)
    assert told == "the gradient norm is nan (a row of logits holds a NaN)"


def test_more_skips_than_are_looked_at_are_refused():
    settings = {"run": {"directory": "out"}, "model": {"path": "hf"}, "optimizer": {"guard": {"most_skips": 11}}}
    with pytest.raises(RequestError, match="most_skips=11 cannot be among=10 updates; use most_skips=10"):
        build_recipe(settings)


def test_the_alert_takes_the_place_of_nothing_trained():
    row = {"tokens/trained": 0.0, "guard/skipped": 2.0, "guard/skipped_total": 5.0}
    (text,) = alerts_for([row])
    assert text.startswith("skipped updates: 2 in this step, 5 in the run") and "likely cause" in text
    assert alerts_for([row, {"tokens/trained": 9.0, "guard/skipped": 0.0, "guard/skipped_total": 5.0}]) == []


# advantages whose gradient no float holds, in the second update of step 2, both of step 4, the first of step 5
POISON = """
import numpy as np
from dapo_megatron.algorithms.registry import register_advantage

seen = []

@register_advantage("poisoned", "R minus the mean; far too much in some updates")
def poisoned(group):
    update = len(seen) // 2
    seen.append(group)
    if update in (3, 6, 7, 8):
        return 1e30 * (1.0 + np.arange(len(group.rewards_G)))
    return group.rewards_G - group.rewards_G.mean()
"""


@pytest.mark.distributed
def test_a_run_skips_tells_and_ends_with_the_checkpoint_to_go_back_to(tmp_path, monkeypatch):
    poison, run, final = tmp_path / "poison.py", tmp_path / "run", tmp_path / "final"
    monkeypatch.setenv(FINAL, str(final))
    poison.write_text(POISON)
    settings = ["parallel.pipeline=1", "supervised.stages=[]", "evaluation.every=0", "run.steps=9"]
    settings += ["checkpoint.every=1", "checkpoint.keep=9", "monitoring.report=false"]
    settings += [f"algorithm.extensions=[{poison}]", "algorithm.advantage=poisoned", "optimizer.guard.among=4"]
    settings += ["reward.overlong.max_length=12", "reward.overlong.cache_length=11"]
    done = run_command("train", RECIPE, f"run.directory={run}", *SMALL, *settings)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "3 of the last 4 policy updates were skipped (optimizer.guard), the first of them in step 4" in done.stderr
    assert f"the newest checkpoint from before them is {run}/checkpoints/step-000003: change a setting" in done.stderr
    assert "up to step-000004, out of" in done.stderr and "likely causes: " in done.stderr
    assert "Traceback" not in done.stderr
    assert final.read_text().startswith("3 of the last 4 policy updates")  # a batch job does not repeat it
    metrics = [row for row in read_metrics(run / "metrics.jsonl") if row["step"]]
    assert [row["guard/skipped"] for row in metrics] == [0, 1, 0, 2, 1]
    assert [row["guard/skipped_total"] for row in metrics] == [0, 1, 1, 3, 4]
    assert [row["updates"] for row in metrics] == [2, 1, 2, 0, 0]
    assert all(math.isfinite(row["grad_norm"]) for row in metrics[:3]) and "grad_norm" not in metrics[3]
    records = read_metrics(run / "skipped_updates.jsonl")
    assert [(record["step"], record["part"]) for record in records] == [(s, "policy") for s in (2, 4, 4, 5)]
    for record in records:
        assert "the gradient norm is nan" in record["reason"] and math.isfinite(record["loss"])
        assert [group["responses"] for group in record["groups"]] == [[0, 1, 2, 3]] * 2
        assert all(len(group["rewards"]) == len(group["tokens"]) == 4 for group in record["groups"])
    assert len(re.findall("ALERT  skipped updates", done.stdout)) == 2  # told anew after it had cleared
    states = [json.loads((run / "checkpoints" / f"step-00000{s}" / "state.json").read_text()) for s in (3, 4)]
    assert states[0]["updates"] == states[1]["updates"] and states[1]["guards"]["policy"]["latest"] == [
        None,
        None,
        4,
        4,
    ]
