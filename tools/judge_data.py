"""Verdicts collected in training (reward.judge.collect) → worked examples for a smaller judge, as many YES as NO.

python tools/judge_data.py runs/mine/judge.parquet -o judge-train.jsonl --held-out judge-held-out.parquet
python tools/judge_data.py a.parquet b.parquet -o judge-train.jsonl --targets soft --hostile --seed 1
Then: dapo-megatron train recipes/methods/judge-distil.yaml, and tools/judge_calibration.py on what was held out.
"""

from pathlib import Path
from typing import Annotated

import typer

from dapo_megatron.errors import RequestError, exit_with_message
from dapo_megatron.judging.export import Export, export_judged
from dapo_megatron.rewards.judge_prompt import read_wording


def export(
    inputs: Annotated[list[Path], typer.Argument(help="Files that reward.judge.collect wrote.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Worked examples, .jsonl or .parquet.")],
    targets: Annotated[str, typer.Option(help="hard: the verdict; soft: P(YES) and P(NO) as weights.")] = "hard",
    balance: Annotated[bool, typer.Option("--balance/--as-it-is", help="As many YES as NO.")] = True,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn and of the order.")] = 0,
    prompt: Annotated[
        Path | None, typer.Option(help="File with the text of reward.judge.prompt; the built-in one by default.")
    ] = None,
    held_out: Annotated[Path | None, typer.Option(help="Cases of some questions, .parquet, kept out.")] = None,
    held_out_share: Annotated[float, typer.Option(help="Of the questions.")] = 0.1,
    hostile: Annotated[
        bool, typer.Option("--hostile", help="Add half of the built-in hostile answers, as NO, beside the balance.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
) -> None:
    """Make worked examples of collected verdicts."""
    if targets not in ("hard", "soft"):
        raise RequestError(f"--targets {targets} must be hard or soft; use hard")
    wording = read_wording(prompt)
    counts = export_judged(
        Export(tuple(inputs), output, targets, balance, seed, wording, held_out, held_out_share, hostile, overwrite)
    )
    print(", ".join(f"{name} {count}" for name, count in counts.items()))
    print(f"examples: {output}")


if __name__ == "__main__":
    with exit_with_message():
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(export)
        app()
