"""What a rollout step of 512 prompts x 16 responses x 20,000 tokens (164 M tokens) costs beside model and engine.

Synthetic groups go through dynamic sampling's filter, the scoring pass, batches, advantages, aggregation, mini-batches,
packing plans and all metrics of the step, by the functions that a run calls; a learner without a model stands in for
the real one, and its random log-probs are made beforehand.

    python tools/bench_bookkeeping.py [--prompts 512] [--samples 16] [--tokens 20000] [--output FILE.csv]

One process of one thread; system_s is what the kernel takes to hand out fresh pages. Memory: the peak of the process
beyond what stood there before: interpreter, groups, and the stand-in's log-probs.
"""

import argparse
import csv
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dapo_megatron.config import load_recipe  # noqa: E402
from dapo_megatron.data.completions import Completion, PromptGroup  # noqa: E402
from dapo_megatron.data.packing import assign_micro_batches  # noqa: E402
from dapo_megatron.data.records import SequenceBatch  # noqa: E402
from dapo_megatron.files import atomic_path  # noqa: E402
from dapo_megatron.learner.losses import POLICY_SUMS  # noqa: E402
from dapo_megatron.monitoring.step_metrics import learner_metrics, rollout_metrics  # noqa: E402
from dapo_megatron.policy_step import learn_step, score_old_policy  # noqa: E402
from dapo_megatron.rollout.dynamic_sampling import sample_step  # noqa: E402

PROMPT_TOKENS = 200
DATA_PARALLEL = 16
RECIPE = ROOT / "recipes" / "tiny-arithmetic-cpu.yaml"
DEFAULT_OUTPUT = ROOT / "docs" / "benchmarks" / "bookkeeping-cpu.csv"


@dataclass
class ModelFreeLearner:
    """Answers as a learner does, from log-probs and entropies made beforehand."""

    logprobs_T: Tensor
    entropy_T: Tensor
    tokens_per_micro_batch: int
    head: None = None

    def score(self, batch: SequenceBatch) -> tuple[list[np.ndarray], list[np.ndarray]]:
        stops = np.cumsum([len(response) for response in batch.responses])[:-1]
        return np.split(self.logprobs_T.numpy(), stops), np.split(self.entropy_T.numpy(), stops)

    def packing(self, batch: SequenceBatch, sequences) -> list[list[list[int]]]:
        lengths = [batch.length(s) for s in sequences]
        return assign_micro_batches(lengths, token_budget=self.tokens_per_micro_batch, data_parallel=DATA_PARALLEL)

    def gradients(self, batch: SequenceBatch, sequences, loss) -> Tensor:
        self.packing(batch, sequences)
        return torch.ones(len(POLICY_SUMS), dtype=torch.float64)

    def step(self, learning_rate: float, weight_decay: float) -> float:
        return 1.0


def synthetic_groups(prompts: int, samples: int, tokens: int, rng: np.random.Generator) -> list[PromptGroup]:
    """Mixed groups; every response has `tokens` tokens and arrays of its own."""
    groups = []
    for i in range(prompts):
        completions = [
            Completion(
                ticket=i * samples + j,
                tokens=rng.integers(0, 150_000, tokens, dtype=np.int32),
                logprobs=-rng.random(tokens, dtype=np.float32),
                finish_reason="length" if j == 0 else "stop",
                policy_versions=np.full(tokens, 3, np.int32),
            )
            for j in range(samples)
        ]
        right = np.arange(samples) % 3 == 0
        rewards = np.where(right, 1.0, -1.0).astype(np.float32)
        prompt = rng.integers(0, 150_000, PROMPT_TOKENS, dtype=np.int32)
        groups.append(PromptGroup(i, "question", "1", prompt, completions, ["Answer: 1"] * samples, right, rewards))
    return groups


def resident_bytes(field: str) -> int:
    """`VmRSS` now, or the `VmHWM` so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) << 10


def measure(prompts: int, samples: int, tokens: int) -> dict[str, object]:
    """Seconds of each part, and bytes."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    groups = synthetic_groups(prompts, samples, tokens, rng)
    rows = prompts * samples * tokens
    scores = [torch.from_numpy(-rng.random(rows, dtype=np.float32)) for _ in range(2)]
    learner = ModelFreeLearner(*scores, tokens_per_micro_batch=PROMPT_TOKENS + tokens)
    recipe = load_recipe(RECIPE, [f"rollout.max_response_length={tokens}", "algorithm.mini_batch_prompts=32"])
    sampling = recipe.algorithm.dynamic_sampling
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    seconds: dict[str, float] = {}
    started_cpu = os.times()

    def timed(name: str, work):
        started = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - started
        return result

    sampled = timed("sampling", lambda: sample_step(lambda count, wave: groups, sampling, wanted=prompts))
    assert len(sampled.trained) == prompts
    timed("rollout_metrics", lambda: rollout_metrics(sampled))
    timed("old_policy", lambda: score_old_policy(learner, sampled.trained, recipe.algorithm))
    result = timed("learn_step", lambda: learn_step(learner, sampled.trained, recipe, learning_rate=1e-6))
    timed("learner_metrics", lambda: learner_metrics(result))
    ended_cpu = os.times()
    return {
        "prompts": prompts,
        "samples": samples,
        "tokens": tokens,
        **{f"{name}_s": f"{value:.3g}" for name, value in seconds.items()},
        "total_s": f"{sum(seconds.values()):.3g}",
        "user_s": f"{ended_cpu.user - started_cpu.user:.3g}",
        "system_s": f"{ended_cpu.system - started_cpu.system:.3g}",
        "groups_bytes": prompts * samples * tokens * 12,
        "added_bytes": resident_bytes("VmHWM") - before,
    }


def environment(load: float) -> dict[str, object]:
    """What the numbers were taken on."""
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {
        "machine": model.partition(":")[2].strip() or platform.machine(),
        "cores": os.cpu_count(),
        "load": f"{load:.3g}",
        "torch": torch.__version__,
        "commit": commit.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    row = measure(arguments.prompts, arguments.samples, arguments.tokens) | environment(load)
    for name, value in row.items():
        print(f"{name:<18} {value}")
    with atomic_path(arguments.output) as path, open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        writer.writeheader()
        writer.writerow(row)


if __name__ == "__main__":
    main()
