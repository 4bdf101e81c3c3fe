"""A rank that stands still is named, and the run ends."""

import re
import subprocess
import sys
import time

import pytest

from tests.command_line import RECIPE, SMALL, run_command

SLEEPER = """
import os, pathlib, time
from dapo_megatron.algorithms.registry import register_advantage

seen = []

@register_advantage("sleepy", "R minus the mean; rank 1 falls asleep in its second step")
def sleepy(group):
    seen.append(group)
    if os.environ.get("RANK") == "1" and len(seen) > 4:
        fall_asleep()
    return group.rewards_G - group.rewards_G.mean()

def fall_asleep():
    time.sleep(600)
"""


@pytest.mark.distributed
def test_a_rank_that_sleeps_is_named_with_its_stack_and_all_end(tmp_path):
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text(SLEEPER)
    settings = ["parallel.pipeline=1", "supervised.stages=[]", "evaluation.every=0", "run.stall_limit_s=12"]
    settings += [f"algorithm.extensions=[{sleeper}]", "algorithm.advantage=sleepy", "checkpoint.every=0"]
    started = time.monotonic()
    done = run_command("train", RECIPE, f"run.directory={tmp_path / 'run'}", *SMALL, *settings)
    assert done.returncode == 1, done.stdout + done.stderr
    told = {int(rank): line for rank, line in re.findall(r"^rank (\d): no progress for 12 s (.*)$", done.stderr, re.M)}
    assert set(told) == {0, 1}, done.stderr
    assert told[1] == "in learn, step 1 (run.stall_limit_s); it is at sleeper.py:15 fall_asleep"
    assert re.fullmatch(r"in learn, step 1 .*; it waits for other ranks in \w+, called at \w+\.py:\d+ \w+", told[0])
    assert "rank 1, thread MainThread:" in done.stderr and "time.sleep(600)" in done.stderr
    assert time.monotonic() - started < 200


# a search that takes for ever and lets no other thread run
STUCK = """
import re, sys
from dapo_megatron import watchdog
watchdog.LATE_S = 0.5
dog = watchdog.Watchdog(0.5, rank=3)
def search():
    re.match(r"(a+)+$", "a" * 60 + "b")
if sys.argv[1] == "stuck":
    search()
import time
for _ in range(6):
    dog.beat("something")
    time.sleep(0.2)
dog.close()
time.sleep(1.5)
print("left alone")
"""


def test_what_is_stuck_outside_of_python_is_told_too_and_what_moves_is_left_alone():
    stuck, moving = (
        subprocess.run([sys.executable, "-c", STUCK, what], capture_output=True, text=True, timeout=120)
        for what in ("stuck", "moving")
    )
    assert stuck.returncode == 1 and "in search" in stuck.stderr
    assert moving.returncode == 0 and moving.stdout == "left alone\n", moving.stderr
