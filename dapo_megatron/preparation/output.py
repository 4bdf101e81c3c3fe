"""The prepared file and the report beside it; both appear whole or not at all."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dapo_megatron.data.prompts import Prompt
from dapo_megatron.data.repeats import short
from dapo_megatron.files import atomic_path, write_text_atomically
from dapo_megatron.preparation.selection import Drop, Item

EXAMPLES = 5  # dropped rows shown for each reason
OUTPUTS = (".jsonl", ".parquet")


def write_items(path: Path, items: Sequence[Item]) -> None:
    """Rows {prompt, answer, source, row, original_prompt, original_answer, rule}; .jsonl or .parquet.

    prompt is text, or a list of {role, content} in every row when one row has a conversation. original_* and rule are
    null where nothing changed.
    """
    conversations = any(item.prompt.messages is not None for item in items)
    rows = [_row(item, conversations) for item in items]
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        text = pyarrow.string()
        turns = pyarrow.list_(pyarrow.struct([("role", text), ("content", text)])) if conversations else text
        kinds = {"prompt": turns, "row": pyarrow.int64()}
        names = ("prompt", "answer", "source", "row", "original_prompt", "original_answer", "rule")
        schema = pyarrow.schema([(name, kinds.get(name, text)) for name in names])
        with atomic_path(path) as temporary:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema=schema), temporary)
    else:
        write_text_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def report_of(
    inputs: Mapping[str, int], kept: Sequence[Item], drops: Sequence[Drop], details: Mapping[str, Any]
) -> dict[str, Any]:
    """Counts of a preparation as a JSON object.

    {inputs: {file: rows}, rows, kept, respelled, rewritten, dropped: {reason: {count, examples}}} and `details`;
    rows = kept + the sum of all counts.
    """
    counts = Counter(drop.reason for drop in drops)
    dropped = {
        reason: {
            "count": count,
            "examples": [_example(drop) for drop in drops if drop.reason == reason][:EXAMPLES],
        }
        for reason, count in counts.most_common()
    }
    rewritten = sum(item.rule is not None for item in kept)
    return {
        "inputs": dict(inputs),
        "rows": sum(inputs.values()),
        "kept": len(kept),
        "respelled": sum(item.original is not None for item in kept) - rewritten,
        "rewritten": rewritten,
        "dropped": dropped,
        **details,
    }


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """The report as indented JSON."""
    write_text_atomically(path, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def describe_report(report: Mapping[str, Any]) -> list[str]:
    """The report in lines for people."""
    lines = [f"{report['rows']} rows read, {report['kept']} kept"]
    if report["respelled"]:
        lines.append(f"{report['respelled']:>8}  answers respelled as the integer they are")
    if report["rewritten"]:
        lines.append(f"{report['rewritten']:>8}  questions rewritten to ask for an integer")
    for reason, found in report["dropped"].items():
        first = found["examples"][0]
        lines.append(
            f"{found['count']:>8}  dropped: {reason} (first: {first['source']} row {first['row']}, {first['detail']})"
        )
    return lines


def _example(drop: Drop) -> dict[str, Any]:
    item = drop.item
    return {"source": item.source, "row": item.row, "prompt": short(item.prompt.text), "detail": drop.detail}


def _row(item: Item, conversations: bool) -> dict[str, Any]:
    return {
        "prompt": _turns(item.prompt) if conversations else item.prompt.text,
        "answer": item.prompt.answer,
        "source": item.source,
        "row": item.row,
        "original_prompt": None if item.original is None else item.original.text,
        "original_answer": None if item.original is None else item.original.answer,
        "rule": item.rule,
    }


def _turns(prompt: Prompt) -> list[dict[str, str]]:
    if prompt.messages is None:
        return [{"role": "user", "content": prompt.text}]
    return [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
