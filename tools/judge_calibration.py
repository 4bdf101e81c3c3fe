"""How good a judge is on cases with a known truth: accuracy, AUC, Brier, ECE, reliability, by subject; JSON and PNG.

python tools/judge_calibration.py held-out.parquet --judge runs/methods/judge-distil/hf --plain --hostile -o report
python tools/judge_calibration.py labelled.jsonl --truth-column right --subject-column subject \\
    --judge small=models/small --judge large=models/large --url http://localhost:8000/v1 --served NAME -o report
A file that knows its teacher's P(YES) (column p_yes, as reward.judge.collect writes it) has the judges held to it, too.
"""

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dapo_megatron.config.reward import Judge
from dapo_megatron.errors import RequestError, exit_with_message
from dapo_megatron.files import write_text_atomically
from dapo_megatron.judging.calibration import TEACHER, calibrate, read_cases, subjects_of
from dapo_megatron.judging.hostile import count_fooled
from dapo_megatron.rewards.judge import check_judge, open_judge
from dapo_megatron.rewards.judge_prompt import read_wording
from dapo_megatron.rewards.verdicts import Judging

LEAST_S = 300.0  # of a few cases, whose server may first have to start


def calibration(
    cases: Annotated[Path, typer.Argument(help="question, answer, reference and a truth: .parquet, .jsonl, .json.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for calibration.json and .png.")],
    judge: Annotated[list[str] | None, typer.Option(help="FOLDER or NAME=FOLDER; may be repeated.")] = None,
    url: Annotated[str | None, typer.Option(help="OpenAI-compatible server of one more judge.")] = None,
    served: Annotated[str | None, typer.Option(help="Its model's name there.")] = None,
    key_variable: Annotated[str | None, typer.Option(help="Environment variable with its key.")] = None,
    timeout_s: Annotated[float, typer.Option(min=0.001, help="Longest wait for one of its replies.")] = 30.0,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests to it under way at once.")] = 16,
    limit_s: Annotated[
        float | None,
        typer.Option(min=0.001, help="Longest time for all; by default as long as their replies may take."),
    ] = None,
    truth_column: Annotated[str | None, typer.Option(help="By default the teacher's verdict.")] = None,
    subject_column: Annotated[str | None, typer.Option(help="Compared subject by subject.")] = None,
    subjects: Annotated[Path | None, typer.Option(help="Prompt file that has this column, if not CASES.")] = None,
    prompt_column: Annotated[str, typer.Option(help="Its questions.")] = "prompt",
    prompt: Annotated[Path | None, typer.Option(help="File with the text of reward.judge.prompt.")] = None,
    chat_template: Annotated[bool, typer.Option("--chat/--plain", help="The folders' chat template.")] = True,
    hostile: Annotated[
        bool, typer.Option("--hostile", help="Count the built-in hostile answers that each judge takes for right.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite")] = False,
) -> None:
    """Hold judges to the truth, and to their teacher."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    files = [output / "calibration.json", output / "calibration.png"]
    for path in files:
        if path.exists() and not overwrite:
            raise RequestError(f"{path} exists; choose another folder or allow --overwrite")
    if subjects is not None and subject_column is None:
        raise RequestError("--subjects needs --subject-column, the column of that file with the subject")
    data = read_cases(cases, truth_column=truth_column, subject_column=None if subjects else subject_column)
    if subjects is not None:
        names = subjects_of(data.cases, subjects, prompt_column=prompt_column, subject_column=subject_column)
        data = replace(data, subjects=names)
    wording = read_wording(prompt)
    settings = {
        name: Judge(model=folder, prompt=wording, chat_template=chat_template) for name, folder in _named(judge or [])
    }
    if url is not None:
        settings["server"] = Judge(
            url=url,
            model=served,
            key_variable=key_variable,
            prompt=wording,
            timeout_s=timeout_s,
            concurrency=concurrency,
            limit_s=limit_s or max(LEAST_S, timeout_s * math.ceil(len(data.cases) / concurrency)),
        )
    for chosen in settings.values():
        check_judge(chosen)
    judges = {name: _open(chosen) for name, chosen in settings.items()}
    report = {"data": str(cases), **calibrate(data, judges)}
    if hostile:
        report["hostile"] = count_fooled(data.cases, judges)
    write_text_atomically(files[0], json.dumps(report, indent=1) + "\n")
    from dapo_megatron.judging.calibration_figure import draw_calibration

    draw_calibration(report, files[1])
    for line in describe(report):
        print(line)
    print(f"report:  {files[0]}\npicture: {files[1]}")


def describe(report: dict[str, Any]) -> list[str]:
    """The report in a few lines for people."""
    lines = [f"{report['cases']} cases, {len(report['subjects'])} subjects; rule: {_numbers(report['rule'])}"]
    for name, judge in report["judges"].items():
        counts = {"without a verdict": judge["without_verdict"], "unreached": judge["unreached"]}
        without = "".join(f", {count} {what}" for what, count in counts.items() if count)
        lines.append(f"{name}: {_numbers(judge['quality'])}{without}")
        lines += [f"  {mode} reward: {_numbers(judge['rewards'][mode])}" for mode in ("binary", "soft")]
        if "teacher" in judge:
            lines.append(f"  beside the teacher: {_numbers(judge['teacher'])}")
    return lines + [_fooled(name, counts) for name, counts in report.get("hostile", {}).items()]


def _fooled(name: str, counts: dict[str, Any]) -> str:
    def told(part: dict[str, int]) -> str:
        return f"{part['fooled']} of {part['cases']}"

    kinds = ", ".join(f"{kind} {told(part)}" for kind, part in counts["by_kind"].items())
    silent = counts["without_verdict"] + counts["unreached"]
    without = f", {silent} without a verdict" if silent else ""
    taught = f"{told(counts['taught'])} that judge_data --hostile teaches, {told(counts['others'])} others"
    return f"{name}: fooled by {told(counts)} hostile answers{without} ({taught}; {kinds})"


def _numbers(values: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {'none' if value is None else f'{value:.3f}'}" for name, value in values.items() if name != "cases"
    )


def _named(judges: list[str]) -> list[tuple[str, str]]:
    """(name, folder) of each; the folder is its own name where none is given."""
    found = []
    for text in judges:
        name, equals, folder = text.partition("=")
        found.append((name, folder) if equals else (text, text))
    names = [name for name, _ in found]
    for name in names:
        if not name or names.count(name) > 1 or name in (TEACHER, "server"):
            raise RequestError(f"--judge: the name {name!r} is taken or empty; give another as NAME=FOLDER")
    return found


def _open(settings: Judge) -> Judging:
    if settings.url is not None:
        return open_judge(settings, None)
    import torch

    return open_judge(settings, torch.device("cuda", 0) if torch.cuda.is_available() else None)


if __name__ == "__main__":
    with exit_with_message():
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        app.command()(calibration)
        app()
