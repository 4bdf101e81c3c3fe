"""The demo's claim beside its controls, over several seeds: writes a table (Markdown and JSON).

Each seed makes one warm start; every variant continues from its checkpoint for the same number of rollout steps.
Finished cells are kept, so the command can be stopped and started again.

    python tools/tiny_controls.py [--out runs/controls] [--seeds 0 1 2]
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

RECIPE = Path(__file__).parent.parent / "recipes" / "tiny-arithmetic-cpu.yaml"
STEPS = 40
STAGES = (
    "{data: worked, steps: 350, batch_sequences: 64, learning_rate: 3.0e-3, schedule: cosine, warmup_steps: 20}, "
    "{data: mixed, steps: 80, batch_sequences: 64, learning_rate: 1.0e-3, schedule: linear}"
)
VARIANTS = {
    "DAPO": [],
    "rewards shuffled across responses": ["reward.shuffle=true"],
    "supervised continuation, no RL": [
        "run.steps=0",
        # as many updates, from the same learning rate, as the 40 rollout steps make
        f"supervised.stages=[{STAGES}, {{data: mixed, steps: 80, batch_sequences: 64, learning_rate: 1.0e-4, "
        "schedule: cosine, min_learning_rate: 1.0e-5}]",
    ],
    "learning rate 0": ["optimizer.learning_rate=0", "optimizer.min_learning_rate=0"],
    "weight sync disabled": ["resharding.enabled=false"],
}


def train(directory: Path, seed: int, *arguments: str) -> subprocess.CompletedProcess:
    """One run of the tiny recipe; its output is kept beside it."""
    command = [
        *(sys.executable, "-m", "dapo_megatron.cli", "train", str(RECIPE), f"run.directory={directory}"),
        *(f"run.seed={seed}", "checkpoint.hugging_face=false", "monitoring.tensorboard=false"),
        *arguments,
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    directory.with_suffix(".log").write_text(result.stdout + result.stderr)
    return result


def cell(out: Path, seed: int, name: str, overrides: list[str]) -> dict:
    """Accuracies of one variant: {"steps": {step: [sampled, greedy]}, "alarm": step or None}."""
    warm = out / f"seed{seed}" / "warm"
    if not list(warm.glob("checkpoints/step-000000/manifest.json")):
        result = train(warm, seed, "run.steps=0", "--overwrite")
        assert result.returncode == 0, result.stderr
    directory = out / f"seed{seed}" / name.replace(" ", "-").replace(",", "")
    kept = directory.with_suffix(".json")
    if kept.exists():
        return json.loads(kept.read_text())
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(warm, directory)
    result = train(directory, seed, f"run.steps={STEPS}", *overrides, "--resume")
    alarm = None
    if "mismatch alarm at step" in result.stderr:
        alarm = int(result.stderr.split("mismatch alarm at step ")[1].split(":")[0])
    assert result.returncode == (0 if alarm is None else 1), result.stderr
    steps = {}
    for line in map(json.loads, (directory / "metrics.jsonl").read_text().splitlines()):
        if "validation/accuracy" in line:
            step = STEPS if "run.steps=0" in overrides else line["step"]
            steps[step] = [line["validation/accuracy"], line["validation/accuracy_greedy"]]
    record = {"steps": steps, "alarm": alarm}
    kept.write_text(json.dumps(record))
    return json.loads(kept.read_text())


def table(cells: dict[str, list[dict]]) -> str:
    """Markdown: a row a variant, sampled / greedy accuracy of each seed."""
    shown = [0, 10, 20, 30, 40]
    lines = [
        "| variant | " + " | ".join(f"step {step}" for step in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    start = [c["steps"]["0"] for c in cells["DAPO"]]
    for name, records in cells.items():
        entries = []
        for step in shown:
            parts = []
            for i, record in enumerate(records):
                found = record["steps"].get(str(step)) if step else start[i]
                if found:
                    parts.append(f"{found[0]:.2f}/{found[1]:.2f}")
                elif record["alarm"] and step == next(s for s in shown if s >= record["alarm"]):
                    parts.append(f"stopped at {record['alarm']}")
                else:
                    parts.append("–")
            entries.append(" · ".join(parts))
        lines.append(f"| {name} | " + " | ".join(entries) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/controls"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    cells: dict[str, list[dict]] = {name: [] for name in VARIANTS}
    for seed in arguments.seeds:
        for name, overrides in VARIANTS.items():
            cells[name].append(cell(arguments.out, seed, name, overrides))
            print(f"seed {seed}, {name}: {cells[name][-1]}", flush=True)
    (arguments.out / "controls.json").write_text(json.dumps(cells, indent=2))
    (arguments.out / "controls.md").write_text(table(cells))
    print(table(cells))


if __name__ == "__main__":
    main()
