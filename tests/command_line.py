"""The command line as a user runs it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "tiny-arithmetic-cpu.yaml"

# the tiny recipe, smaller still: seconds instead of minutes
SMALL = (
    "data.generate.train_prompts=64",
    "data.generate.validation_prompts=8",
    "data.generate.supervised_examples=64",
    "supervised.stages=[{data: worked, steps: 3, batch_sequences: 8, learning_rate: 1.0e-3}]",
    "rollout.prompts_per_step=4",
    "rollout.samples_per_prompt=4",
    "rollout.max_response_length=12",
    "algorithm.mini_batch_prompts=2",
    "algorithm.dynamic_sampling.enabled=false",
    "evaluation.samples=1",
    "evaluation.every=2",
    "monitoring.tensorboard=false",
    "optimizer.schedule=constant",  # a decaying one would depend on run.steps, which some tests change
    "run.steps=4",
)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dapo_megatron.cli", *map(str, arguments)]


def environment() -> dict[str, str]:
    worlds = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_", "DAPO_MEGATRON_PREPARED")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(worlds)}
    return {**clean, "TRANSFORMERS_VERBOSITY": "error", "COLUMNS": "200"}


def run_command(*arguments: object, time_limit_s: float = 240) -> subprocess.CompletedProcess:
    """Run `dapo-megatron` with these arguments from the repository root."""
    return subprocess.run(
        command(*arguments), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=time_limit_s
    )
