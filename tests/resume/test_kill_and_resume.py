"""A run that is killed and resumed over and over ends as one that nobody disturbed: tools/kill_and_resume.py."""

import subprocess
import sys

import pytest

from dapo_megatron.config import load_recipe
from dapo_megatron.errors import RequestError
from dapo_megatron.run_directory import claim_run_directory
from tests.command_line import RECIPE, ROOT, environment


@pytest.mark.slow
@pytest.mark.distributed
def test_killed_at_random_moments_of_every_phase(tmp_path):
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "tools/kill_and_resume.py", "--kills", "6", "--work", tmp_path / "work"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6 kills" in result.stdout and "equal to the bit" in result.stdout


def test_no_kill_at_all_is_refused():
    command = [sys.executable, "tools/kill_and_resume.py", "--kills", "0"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "at least 1" in result.stderr and "Traceback" not in result.stderr


def test_a_run_killed_before_its_first_file_had_a_name_may_be_resumed(tmp_path):
    run = tmp_path / "run"
    recipe = load_recipe(RECIPE, [f"run.directory={run}"])
    run.mkdir()
    (run / ".config.yaml.123.tmp").write_text("run:")
    claim_run_directory(recipe, resume=True, overwrite=False)
    (run / "notes.txt").write_text("of somebody else")
    with pytest.raises(RequestError, match="is not a run"):
        claim_run_directory(recipe, resume=True, overwrite=False)
