"""Collected verdicts → worked examples on which a smaller judge is trained by a supervised stage.

A row is the prompt that the judge would be asked, the response YES or NO, and a weight. There is nothing else in it: no
subject, no source.

    hard targets: the teacher's verdict, weight 1
    soft targets: YES with weight P(YES) and NO with weight 1 − P(YES), so that the mean −log π of the rows is the
                  cross-entropy to the teacher
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dapo_megatron.errors import RequestError
from dapo_megatron.files import atomic_path
from dapo_megatron.judging.hostile import hostile_answers, hostile_cases
from dapo_megatron.rewards.judge_prompt import PROMPT, check_wording, render
from dapo_megatron.rewards.judge_records import Judged, first_of_each, read_judged, write_judged

OUTPUTS = (".jsonl", ".parquet")
LEAST_WEIGHT = 1e-3  # of a soft target; less teaches nothing and costs a row


@dataclass(frozen=True)
class Export:
    """What is asked for.

    wording: as `reward.judge.prompt`, None = the built-in one. balance: as many YES as NO. held_out: file of collected
    cases for `held_out_share` of the questions, none of which is in `output`. hostile: those of the hostile answers
    that are for teaching come on top, as NO to questions of `output`.
    """

    inputs: tuple[Path, ...]
    output: Path
    targets: Literal["hard", "soft"] = "hard"
    balance: bool = True
    seed: int = 0
    wording: str | None = None
    held_out: Path | None = None
    held_out_share: float = 0.1
    hostile: bool = False
    overwrite: bool = False


def export_judged(request: Export) -> dict[str, int]:
    """Write the examples, and the held-out cases where asked for; returns counts by name.

    Raises:
        RequestError: a file that cannot be read or is there already, a wording without places, no case of a verdict
            that is to be balanced.
    """
    _check(request)
    rows = _read(request.inputs)
    counts = {"read": len(rows)}
    if request.held_out is not None:
        rows, held = split_by_question(rows, request.held_out_share, request.seed)
        counts["held out"] = len(held)
    counts |= {"YES": sum(row.verdict == "YES" for row in rows), "NO": sum(row.verdict == "NO" for row in rows)}
    if request.balance:
        rows = balanced(rows, request.seed)
    if request.hostile and rows:
        taught = [answer for answer in hostile_answers() if answer.taught]
        rows = [*rows, *(Judged(case, 0.0) for case in hostile_cases(taught, [row.case for row in rows], request.seed))]
        counts["hostile"] = len(taught)
    examples = examples_of(rows, request.targets, request.wording or PROMPT, request.seed)
    if not examples:
        raise RequestError(f"{', '.join(map(str, request.inputs))}: no judged case to train on; collect more")
    counts |= {"cases": len(rows), "examples": len(examples)}
    _write(request.output, examples)
    if request.held_out is not None:
        write_judged(request.held_out, held)
    return counts


def balanced(rows: Sequence[Judged], seed: int) -> list[Judged]:
    """All rows of the rarer verdict and as many of the other, drawn without replacement; in their order.

    Raises:
        RequestError: no row of one of them.
    """
    places = {word: [i for i, row in enumerate(rows) if row.verdict == word] for word in ("YES", "NO")}
    for word, found in places.items():
        if not found:
            raise RequestError(
                f"none of {len(rows)} judged cases is a {word}: they cannot be balanced; collect more, or export them "
                "as they are"
            )
    count = min(map(len, places.values()))
    rng = np.random.default_rng(seed)
    kept = [i for found in places.values() for i in rng.choice(found, count, replace=False)]
    return [rows[i] for i in sorted(kept)]


def split_by_question(rows: Sequence[Judged], share: float, seed: int) -> tuple[list[Judged], list[Judged]]:
    """(rest, held out): `share` of the questions, at least one, with all their rows."""
    questions = sorted({row.case.question for row in rows})
    count = min(len(questions), max(1, round(share * len(questions))))
    chosen = np.random.default_rng([seed, 1]).choice(len(questions), count, replace=False)
    held = {questions[i] for i in chosen}
    parts: tuple[list[Judged], list[Judged]] = ([], [])
    for row in rows:
        parts[row.case.question in held].append(row)
    return parts


def examples_of(rows: Iterable[Judged], targets: str, wording: str, seed: int) -> list[dict[str, Any]]:
    """{prompt, response, weight} of every row, shuffled."""
    examples = []
    for row in rows:
        prompt = render(row.case, wording)
        shares = {"YES": row.p_yes, "NO": 1 - row.p_yes} if targets == "soft" else {row.verdict: 1.0}
        examples += [
            {"prompt": prompt, "response": word, "weight": weight}
            for word, weight in shares.items()
            if weight >= LEAST_WEIGHT
        ]
    order = np.random.default_rng([seed, 2]).permutation(len(examples))
    return [examples[i] for i in order]


def _check(request: Export) -> None:
    if request.output.suffix not in OUTPUTS:
        raise RequestError(f"{request.output}: unknown extension; the output must be {' or '.join(OUTPUTS)}")
    if not 0 < request.held_out_share < 1:
        raise RequestError(f"--held-out-share {request.held_out_share} must lie between 0 and 1; use 0.1")
    if request.held_out is not None and request.held_out.suffix != ".parquet":
        raise RequestError(f"{request.held_out}: held-out cases are written as .parquet")
    written = [request.output, *([request.held_out] if request.held_out else [])]
    for path in written:
        if path.resolve() in {file.resolve() for file in request.inputs}:
            raise RequestError(f"{path} is read by this request; write to another file")
        if path.exists() and not request.overwrite:
            raise RequestError(f"{path} exists; choose another name or allow --overwrite")
    if len({path.resolve() for path in written}) < len(written):
        raise RequestError(f"{request.output} is named twice; name another file for the held-out cases")
    if request.wording is not None:
        check_wording(request.wording)


def _read(paths: Sequence[Path]) -> list[Judged]:
    """The cases of all files, each once, with its first verdict."""
    return list(first_of_each(row for path in paths for row in read_judged(path)).values())


def _write(path: Path, examples: Sequence[dict[str, Any]]) -> None:
    with atomic_path(path) as temporary:
        if path.suffix == ".parquet":
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(examples)), temporary)
        else:
            text = "".join(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)
            temporary.write_text(text, encoding="utf-8")
