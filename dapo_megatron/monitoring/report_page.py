"""The page of the report: one HTML file without links or scripts. Everything a model or a user wrote is escaped."""

import base64
import html
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import yaml

from dapo_megatron.monitoring.entropy_law import SHARES
from dapo_megatron.monitoring.report_entropy import describe_law
from dapo_megatron.monitoring.run_record import RunRecord
from dapo_megatron.monitoring.step_text import duration

LONGEST_TEXT = 6000  # characters of a prompt or completion on the page
MOST_SAMPLES = 40  # cards a run
MOST_COMPLETIONS = 6  # a card; the first and the last are always among them
ABSENT = "n/a"
RANKS = "time/ranks"
TAIL = 10  # steps whose mean is the final value of a noisy metric

# content a browser must not act upon even if escaping failed
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
CSS = """
body { font: 15px/1.5 system-ui, sans-serif; color: #22282d; max-width: 1280px; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.2rem; margin-top: 2.4rem; }
p.lead { color: #5f6b73; margin-top: 0; } img { width: 100%; border: 1px solid #e8ebee; border-radius: 6px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: .3rem 1.4rem .3rem 0; border-bottom: 1px solid #e8ebee; vertical-align: top; }
thead th { color: #7a858e; font-weight: 600; } tbody th { font-weight: 500; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; margin: .3rem 0; font-size: 13px; }
details { border: 1px solid #e8ebee; border-radius: 6px; padding: .5rem 1rem; margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; }
.card { border: 1px solid #e8ebee; border-radius: 6px; padding: .6rem 1rem; margin: .8rem 0; }
.answers { display: flex; flex-wrap: wrap; gap: 1rem; } .answers > div { flex: 1 1 20rem; min-width: 0; }
.answers pre { background: #f6f7f8; border-radius: 4px; padding: .5rem .7rem; max-height: 24rem; overflow-y: auto; }
.right { color: #2f7d62; font-weight: 600; } .wrong { color: #b3492c; font-weight: 600; } .dim { color: #7a858e; }
"""


def render_page(runs: Sequence[RunRecord], picture: bytes) -> str:
    """The whole HTML text. `picture` is a PNG, embedded as base64."""
    title = runs[0].label if len(runs) == 1 else f"{len(runs)} runs"
    image = base64.b64encode(picture).decode("ascii")
    lead = ", ".join(run.label for run in runs) if len(runs) > 1 else "DAPO training report"
    body = [
        f"<h1>{_text(title)}</h1>",
        f'<p class="lead">{_text(lead)}</p>',
        f'<img alt="Training curves" src="data:image/png;base64,{image}">',
        "<h2>Numbers</h2>",
        _numbers_table(runs),
        *_differences(runs),
        *_ranks(runs),
        "<h2>Sample completions</h2>",
        *(_samples(run, named=len(runs) > 1) for run in runs),
        "<h2>Recipe</h2>",
        *(_recipe(run) for run in runs),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{CSS}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _numbers_table(runs: Sequence[RunRecord]) -> str:
    rows: list[tuple[str, Callable[[RunRecord], str]]] = [
        ("Rollout steps", lambda run: str(int(run.metrics[-1]["step"])) if run.metrics else ""),
        ("Supervised steps", lambda run: str(len(run.supervised)) if run.supervised else ""),
        ("Validation accuracy, sampled", lambda run: _first_last_best(run, "validation/accuracy")),
        ("Validation accuracy, greedy", lambda run: _first_last_best(run, "validation/accuracy_greedy")),
        ("Validation, any of k right", lambda run: _first_last_best(run, "validation/pass")),
        ("Validation, majority of k", lambda run: _first_last_best(run, "validation/majority")),
        ("Standard error of validation", lambda run: _first_tail(run, "validation/standard_error", ".3f")),
        ("Train accuracy", lambda run: _first_tail(run, "accuracy/train", ".3f")),
        ("Reward", lambda run: _first_tail(run, "reward/mean", "+.3f")),
        ("Entropy, nats", lambda run: _first_tail(run, "entropy/mean", ".3f")),
        ("Covariance of log-prob and advantage", lambda run: _first_tail(run, "covariance/mean", ".3g")),
        *((f"Entropy law from the first {share:.0%}", partial(describe_law, share=share)) for share in SHARES),
        ("Mean probability", lambda run: _first_tail(run, "probability/mean", ".3f")),
        ("Response length, tokens", lambda run: _first_tail(run, "response_length/mean", ".1f")),
        ("Truncated responses", lambda run: _first_tail(run, "truncated_fraction", ".1%")),
        ("Groups all right", lambda run: _first_tail(run, "groups/all_right", ".3g")),
        ("Groups all wrong", lambda run: _first_tail(run, "groups/all_wrong", ".3g")),
        ("Mismatch, nats", lambda run: _first_tail(run, "mismatch/logprob_abs_mean", ".2e")),
        ("KL to the reference, nats", lambda run: _first_tail(run, "kl/mean", ".3g")),
        ("Packing efficiency", lambda run: _mean(run, "packing/efficiency", ".1%")),
        ("Tokens generated", lambda run: _total(run, "tokens/generated")),
        ("Tokens trained", lambda run: _total(run, "tokens/trained")),
        ("Time of all steps", lambda run: _total_time(run, "time/step")),
        ("Time of all validations", lambda run: _total_time(run, "time/validation")),
        ("Rollout / learn / reshard", _time_split),
    ]
    filled = [(name, cells) for name, value in rows if any(cells := [value(run) for run in runs])]
    if not filled:
        return '<p class="dim">Nothing recorded yet.</p>'
    note = f"Arrows go from the first value to the last; a training metric ends in the mean of its last {TAIL} steps."
    return f'<p class="dim">{note}</p>' + _table(runs, filled)


def _table(runs: Sequence[RunRecord], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f"<th>{_text(run.label)}</th>" for run in runs)
    body = "".join(
        f"<tr><th>{_text(name)}</th>" + "".join(f"<td>{_text(cell or ABSENT)}</td>" for cell in cells) + "</tr>"
        for name, cells in rows
    )
    return f'<div class="wide"><table><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _finite(run: RunRecord, key: str) -> list[tuple[float, float]]:
    return [(step, value) for step, value in zip(*run.series(key), strict=True) if math.isfinite(value)]


def _first_last_best(run: RunRecord, key: str) -> str:
    points = _finite(run, key)
    if not points:
        return ""
    # the earliest of equal bests
    step, best = max(points, key=lambda point: (point[1], -point[0]))
    return f"{points[0][1]:.3f} → {points[-1][1]:.3f} (best {best:.3f} at step {step:.0f})"


def _first_tail(run: RunRecord, key: str, form: str) -> str:
    values = [value for _, value in _finite(run, key)]
    if not values:
        return ""
    if len(values) == 1:
        return format(values[0], form)
    tail = values[-TAIL:] if len(values) > TAIL else values[-1:]
    return f"{values[0]:{form}} → {sum(tail) / len(tail):{form}}"


def _mean(run: RunRecord, key: str, form: str) -> str:
    values = [value for _, value in _finite(run, key)]
    return format(sum(values) / len(values), form) if values else ""


def _total(run: RunRecord, key: str) -> str:
    values = [value for _, value in _finite(run, key)]
    return f"{sum(values):,.0f}" if values else ""


def _total_time(run: RunRecord, key: str) -> str:
    values = [value for _, value in _finite(run, key)]
    return f"{duration(sum(values))} ({sum(values) / len(values):.2f} s each)" if values else ""


def _time_split(run: RunRecord) -> str:
    whole = sum(value for _, value in _finite(run, "time/step"))
    if not whole > 0:
        return ""
    parts = [
        sum(value for _, value in _finite(run, f"time/{name}")) / whole for name in ("rollout", "learn", "reshard")
    ]
    return " / ".join(f"{part:.1%}" for part in parts) + f", other {max(0.0, 1 - sum(parts)):.1%}"


def _ranks(runs: Sequence[RunRecord]) -> list[str]:
    """The latest comparison of ranks; nothing where none was made."""
    latest = [next((row for row in reversed(run.metrics) if f"{RANKS}/work/ratio" in row), {}) for run in runs]
    compared = [key for row in latest for key in row if key.startswith(f"{RANKS}/") and key.endswith("/max")]
    if not compared:
        return []
    phases = dict.fromkeys(key.split("/")[2] for key in compared)
    rows = [(name, [_slowest(row, name) for row in latest]) for name in phases]
    note = "Seconds of each rank's own, waits for others apart: median and slowest rank, at the latest comparison."
    return ["<h2>Ranks</h2>", f'<p class="dim">{note}</p>', _table(runs, rows)]


def _slowest(row: Mapping[str, Any], name: str) -> str:
    of = {part: row.get(f"{RANKS}/{name}/{part}") for part in ("median", "max", "slowest", "ratio", "host")}
    if not all(isinstance(of[part], int | float) for part in ("median", "max")):
        return ""
    text = f"median {of['median']:.3g} s, most {of['max']:.3g} s"
    if all(isinstance(of[part], int | float) for part in ("slowest", "ratio")):
        text += f"; rank {of['slowest']:.0f} on {of['host']}, {of['ratio']:.2f} times its like"
    return text


def _differences(runs: Sequence[RunRecord]) -> list[str]:
    recipes = [_settings(run.config) for run in runs]
    if len(runs) < 2 or not all(recipes):
        return []
    keys = sorted({key for recipe in recipes for key in recipe})
    different = [key for key in keys if len({recipe.get(key, ABSENT) for recipe in recipes}) > 1]
    if not different:
        return []
    rows = [(key, [recipe.get(key, ABSENT) for recipe in recipes]) for key in different]
    return ["<h2>Settings that differ</h2>", _table(runs, rows)]


def _settings(config: str) -> dict[str, str]:
    try:
        loaded = yaml.safe_load(config)
    except yaml.YAMLError:
        return {}
    flat: dict[str, str] = {}

    def visit(value: Any, name: str) -> None:
        if isinstance(value, Mapping) and value:
            for key, item in value.items():
                visit(item, f"{name}.{key}" if name else str(key))
        else:
            flat[name] = str(value)

    if isinstance(loaded, Mapping):
        visit(loaded, "")
    return flat


def _recipe(run: RunRecord) -> str:
    if not run.config:
        return f'<p class="dim">{_text(run.label)} has no config.yaml.</p>'
    return f"<details><summary>{_text(run.label)}</summary><pre>{_text(run.config)}</pre></details>"


def _samples(run: RunRecord, named: bool) -> str:
    heading = f"<h3>{_text(run.label)}</h3>" if named else ""
    cards: dict[str, list[Mapping[str, Any]]] = {}
    for sample in run.samples:
        cards.setdefault(str(sample.get("prompt", "")), []).append(sample)
    if not cards:
        return heading + '<p class="dim">No samples were kept.</p>'
    shown = list(cards.items())[:MOST_SAMPLES]
    left = len(cards) - len(shown)
    more = f'<p class="dim">{left} more prompts are in samples.jsonl.</p>' if left else ""
    return heading + "".join(_card(prompt, samples) for prompt, samples in shown) + more


def _card(prompt: str, samples: list[Mapping[str, Any]]) -> str:
    answer = samples[0].get("answer")
    order = {"before": 0, "during": 1, "after": 2}
    ordered = sorted(samples, key=lambda sample: order.get(str(sample.get("when")), 1))
    if len(ordered) > MOST_COMPLETIONS:
        last = MOST_COMPLETIONS - 1
        ordered = [ordered[round(place * (len(ordered) - 1) / last)] for place in range(MOST_COMPLETIONS)]
    columns = "".join(map(_completion, ordered))
    expected = f'<div class="dim">Expected answer: {_text(str(answer))}</div>' if answer is not None else ""
    return f'<div class="card"><pre>{_text(_cut(prompt))}</pre>{expected}<div class="answers">{columns}</div></div>'


def _completion(sample: Mapping[str, Any]) -> str:
    when = {"before": "Before training", "after": "After training"}.get(str(sample.get("when")), "During training")
    step = f", step {sample['step']}" if isinstance(sample.get("step"), int) else ""
    mark = '<span class="right">right</span>' if sample.get("right") else '<span class="wrong">wrong</span>'
    if isinstance(sample.get("reward"), int | float):
        mark += f", reward {sample['reward']:+.3g}"
    response = _text(_cut(str(sample.get("response", ""))))
    return f'<div><div><span class="dim">{when}{step}:</span> {mark}</div><pre>{response}</pre></div>'


def _cut(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return text
    half = LONGEST_TEXT // 2  # the answer stands at the end
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


def _text(text: str) -> str:
    """Escaped for element content and quoted attributes; what a browser or UTF-8 cannot hold becomes U+FFFD."""
    whole = text.encode("utf-8", "replace").decode("utf-8")
    return html.escape("".join(c if c >= " " or c in "\n\t" else "\ufffd" for c in whole), quote=True)
