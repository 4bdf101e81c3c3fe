"""What a rollout step of 512 prompts x 16 responses x 20,000 tokens (164 M tokens) costs beside model and engine.

Synthetic groups go through dynamic sampling's filter, the scoring pass, batches, advantages, aggregation, mini-batches,
packing plans and all metrics of the step, by the functions that a run calls. A learner without a model stands in for
one data-parallel rank of 16: it packs its share for scoring and for every update, and hands out log-probs and entropies
of all responses as a learner does, copied from numbers made beforehand.

    python tools/bench_bookkeeping.py [--prompts 512] [--samples 16] [--tokens 20000] [--output FILE.csv]

One process of one thread, two steps: the first gets its pages from the kernel (system_s), the second is what a run
sees. packing_s is in no other part. added_bytes: the peak of the process in that step beyond what stood there before
the first one: interpreter, groups, and a pool of random numbers.
"""

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dapo_megatron.config import load_recipe  # noqa: E402
from dapo_megatron.data.completions import Completion, PromptGroup  # noqa: E402
from dapo_megatron.data.packing import PackedBatch, assign_micro_batches, pack  # noqa: E402
from dapo_megatron.data.records import SequenceBatch  # noqa: E402
from dapo_megatron.learner.losses import POLICY_SUMS  # noqa: E402
from dapo_megatron.monitoring.step_metrics import learner_metrics, rollout_metrics  # noqa: E402
from dapo_megatron.policy_step import learn_step, score_old_policy  # noqa: E402
from dapo_megatron.rollout.dynamic_sampling import sample_step  # noqa: E402
from tools.bench_record import machine, print_table, write_rows  # noqa: E402

STEPS = 2
PROMPT_TOKENS = 200
DATA_PARALLEL = 16
POOL = 1 << 22
RECIPE = ROOT / "recipes" / "tiny-arithmetic-cpu.yaml"
DEFAULT_OUTPUT = ROOT / "docs" / "benchmarks" / "bookkeeping-cpu.csv"


@dataclass(frozen=True)
class Row:
    """One step: seconds of each part, of all, of the processor; bytes of the groups' arrays, and added at most."""

    step: int
    prompts: int
    samples: int
    tokens: int
    sampling_s: float
    rollout_metrics_s: float
    old_policy_s: float
    learn_step_s: float
    learner_metrics_s: float
    packing_s: float
    total_s: float
    user_s: float
    system_s: float
    groups_bytes: int
    added_bytes: int
    machine: str
    cores: int
    load: float
    commit: str


@dataclass
class ModelFreeLearner:
    """Packs as rank 0 of 16 data-parallel ranks; its log-probs and entropies are cut from a pool, fp32 [2, n]."""

    pool: np.ndarray
    tokens_per_micro_batch: int
    packing_s: float = 0.0
    packed_tokens: list[int] = field(default_factory=list)  # of each pass
    head: None = None

    def score(self, batch: SequenceBatch) -> tuple[list[np.ndarray], list[np.ndarray]]:
        self.packs(batch, range(len(batch)))
        starts = np.random.default_rng(1).integers(0, self.pool.shape[1] - max(batch.lengths), len(batch)).tolist()
        logprobs, entropies = (
            [values[a : a + len(r)].copy() for a, r in zip(starts, batch.responses, strict=True)]
            for values in self.pool
        )
        return logprobs, entropies

    def packing(self, batch: SequenceBatch, sequences: Sequence[int]) -> list[list[list[int]]]:
        assignment = assign_micro_batches(
            [batch.length(s) for s in sequences],
            token_budget=self.tokens_per_micro_batch,
            data_parallel=DATA_PARALLEL,
        )
        return [[[sequences[i] for i in members] for members in rank] for rank in assignment]

    def packs(self, batch: SequenceBatch, sequences: Sequence[int]) -> list[PackedBatch]:
        started = time.perf_counter()
        share = self.packing(batch, sequences)[0]
        lengths = [sum(batch.length(s) for s in members) for members in share]
        packs = [pack(batch, members, length=max(1, n)) for members, n in zip(share, lengths, strict=True)]
        self.packed_tokens.append(sum(lengths))
        self.packing_s += time.perf_counter() - started
        return packs

    def gradients(self, batch: SequenceBatch, sequences: Sequence[int], loss: object) -> Tensor:
        self.packs(batch, sequences)
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


def resident_bytes(name: str) -> int:
    """`VmRSS` now, or the `VmHWM` so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


def measure(prompts: int, samples: int, tokens: int) -> list[Row]:
    """A row a step."""
    torch.set_num_threads(1)
    conditions = machine(os.getloadavg()[0])
    rng = np.random.default_rng(0)
    groups = synthetic_groups(prompts, samples, tokens, rng)
    pool = -rng.random((2, POOL + PROMPT_TOKENS + tokens), dtype=np.float32)
    learner = ModelFreeLearner(pool, tokens_per_micro_batch=PROMPT_TOKENS + tokens)
    before = resident_bytes("VmRSS")
    rows = []
    for step in range(1, STEPS + 1):
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        started = os.times()
        seconds = run_step(learner, groups, tokens)
        ended = os.times()
        for group in groups:  # the next step's come without
            group.old_logprobs, group.entropies = [], []
        rows.append(
            Row(
                step,
                prompts,
                samples,
                tokens,
                **seconds,
                total_s=sum(seconds.values()),
                user_s=ended.user - started.user,
                system_s=ended.system - started.system,
                groups_bytes=prompts * samples * tokens * 12,
                added_bytes=resident_bytes("VmHWM") - before,
                **conditions,
            )
        )
    return rows


def run_step(learner: ModelFreeLearner, groups: list[PromptGroup], tokens: int) -> dict[str, float]:
    """Seconds of each part of one step."""
    recipe = load_recipe(RECIPE, [f"rollout.max_response_length={tokens}", "algorithm.mini_batch_prompts=32"])
    seconds: dict[str, float] = {"packing_s": 0.0}

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        learner.packing_s, started = 0.0, time.perf_counter()
        yield
        seconds[f"{name}_s"] = time.perf_counter() - started - learner.packing_s
        seconds["packing_s"] += learner.packing_s

    with timed("sampling"):
        sampled = sample_step(lambda count, wave: groups, recipe.algorithm.dynamic_sampling, wanted=len(groups))
    assert len(sampled.trained) == len(groups)
    with timed("rollout_metrics"):
        rollout_metrics(sampled)
    with timed("old_policy"):
        score_old_policy(learner, sampled.trained, recipe.algorithm)
    with timed("learn_step"):
        result = learn_step(learner, sampled.trained, recipe, learning_rate=1e-6)
    with timed("learner_metrics"):
        learner_metrics(result)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=512)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    arguments = parser.parse_args()
    rows = measure(arguments.prompts, arguments.samples, arguments.tokens)
    print_table(
        ["", "first step", "second step"],
        [[f.name, *(_cell(getattr(row, f.name)) for row in rows)] for f in fields(Row) if f.name != "step"],
    )
    write_rows(rows, arguments.output)


def _cell(value: float | str) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
