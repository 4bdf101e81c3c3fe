"""Judged cases of a known truth from a file of questions with references, to try out what is made of verdicts.

python tools/judge_cases.py data/multi-subject-rlvr.jsonl --prompt-column messages --answer-column ground_truth -o cases
Writes cases/collected.parquet, as reward.judge.collect would, and cases/held-out.jsonl of other questions, whose column
`right` is the truth. The teacher is played by random numbers and calibrated; no model is asked.
"""

import json
from pathlib import Path
from typing import Annotated

import typer

from dapo_megatron.data.prompts import read_prompts
from dapo_megatron.errors import RequestError, exit_with_message
from dapo_megatron.files import write_text_atomically
from dapo_megatron.judging.export import split_by_question
from dapo_megatron.judging.known_cases import known_cases
from dapo_megatron.rewards.judge_records import first_of_each, write_judged


def cases(
    questions: Annotated[Path, typer.Argument(help="Prompt file: .jsonl, .parquet, .json.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for collected.parquet and held-out.jsonl.")],
    prompt_column: Annotated[str, typer.Option(help="Its questions.")] = "prompt",
    answer_column: Annotated[str, typer.Option(help="Its references.")] = "answer",
    held_out_share: Annotated[float, typer.Option(min=0.01, max=0.99, help="Of the questions.")] = 0.2,
    sharpness: Annotated[
        float, typer.Option(min=0.1, max=10.0, help="d of the teacher, who is right in Φ(d / 2) of the cases.")
    ] = 2.5,
    seed: Annotated[int, typer.Option(min=0, help="Of wording, teacher and split.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
) -> None:
    """Make cases of a known truth."""
    files = [output / "collected.parquet", output / "held-out.jsonl"]
    for path in files:
        if path.exists() and not overwrite:
            raise RequestError(f"{path} exists; choose another folder or allow --overwrite")
    found = known_cases(
        read_prompts(questions, prompt_column=prompt_column, answer_column=answer_column), seed, sharpness
    )
    truth = {known.judged.case: known.right for known in reversed(found)}
    rest, held = split_by_question(list(first_of_each(known.judged for known in found).values()), held_out_share, seed)
    output.mkdir(parents=True, exist_ok=True)
    write_judged(files[0], rest)
    rows = [
        {**row.case._asdict(), "verdict": row.verdict, "p_yes": row.p_yes, "right": truth[row.case]} for row in held
    ]
    write_text_atomically(files[1], "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{len(rest)} cases: {files[0]}\n{len(held)} held out: {files[1]}")


if __name__ == "__main__":
    with exit_with_message():
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(cases)
        app()
