"""`dapo-megatron analyze entropy`: where a model is uncertain, token by token, and what training changed; one process.

Responses are sampled from the model, or read from a file; then the model, and a base model where there is one, score
the same tokens once.
"""

import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dapo_megatron.config import Recipe, load_recipe, read_architecture
from dapo_megatron.errors import RequestError
from dapo_megatron.evaluate_command import (
    check_output,
    engine_for,
    evaluation_recipe,
    find_model,
    hugging_face_folder,
    read_problems,
)
from dapo_megatron.monitoring.step_text import printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dapo_megatron.analysis.token_entropy import TokenizedText


@dataclass(frozen=True)
class EntropyRequest:
    """What `analyze entropy` is asked for. model, base: Hugging Face folders, runs or checkpoints.

    text: a file of recorded responses; data: prompts to sample for; neither: the run's validation prompts. limit: rows
    of the file (None: all). ratio: the share of tokens called forking, in (0, 1]. bins, least_count, listed: as in
    `analysis/entropy_report.py`. settings: as in `evaluation_recipe`.
    """

    model: Path
    base: Path | None = None
    text: Path | None = None
    data: Path | None = None
    limit: int | None = None
    ratio: float = 0.2
    bins: int = 20
    least_count: int = 10
    listed: int = 20
    settings: Mapping[str, Mapping[str, Any]] | None = None
    overrides: Sequence[str] = ()


def check_entropy_request(request: EntropyRequest, output: Path | None, plot: Path | None) -> None:
    """Refuse what cannot work before anything is loaded; `output`, `plot`: the files to write, JSON and PNG.

    Raises:
        RequestError: naming the option.
    """
    if not 0 < request.ratio <= 1:
        raise RequestError(f"--ratio {request.ratio:g} must be more than 0 and at most 1; use 0.2")
    for option, value in (
        ("--bins", request.bins),
        ("--min-count", request.least_count),
        ("--top", request.listed),
        ("--limit", 1 if request.limit is None else request.limit),
    ):
        if value < 1:
            raise RequestError(f"{option} {value} must be positive; use at least 1")
    if request.text is not None and request.data is not None:
        raise RequestError("--text and --data exclude each other: responses are read or sampled; give one")
    for option, path, extension in (("--output", output, ".json"), ("--plot", plot, ".png")):
        for source in (request.text, request.data) if path is not None else ():
            check_output(path, source or request.model, option, extension)


def analyze_entropy(request: EntropyRequest) -> dict[str, Any]:
    """The report of `analysis/entropy_report.py` on the model, {"base": `compared`} with a base, and where it is from.

    Nothing but messages is printed, to standard error.

    Raises:
        RequestError: a model, file or setting that cannot work; vocabularies that differ.
        RunError: an engine or a model failed.
    """
    from dapo_megatron.analysis.entropy_report import compared, entropy_report
    from dapo_megatron.analysis.token_entropy import response_entropies
    from dapo_megatron.rollout.hf_engine import own_device

    started = time.perf_counter()
    found, run, lines = find_model(request.model, "MODEL")
    base, more = None, []
    if request.base is not None:
        base, _, more = find_model(request.base, "--base")
    for line in [*lines, *more]:
        print(line, file=sys.stderr)
    recipe = _recipe(request, found, run)
    # the conversion talks on standard output, which belongs to the result
    with redirect_stdout(sys.stderr), tempfile.TemporaryDirectory(prefix="dapo-analyze-") as scratch:
        places = [Path(scratch) / name for name in ("model", "base")]
        for place in places:
            place.mkdir()
        folder = hugging_face_folder(found, places[0])
        base_folder = None if base is None else hugging_face_folder(base, places[1])
        tokenizer = _tokenizer(folder, base_folder, request)
        texts = _texts(request, recipe, folder, tokenizer, Path(scratch) / "engines")
        for of, option in ((folder, f"MODEL {request.model}"), (base_folder, f"--base {request.base}")):
            if of is not None:
                _check_fit(texts, of, option)
        device = own_device()
        entropies_N = response_entropies(str(folder), texts, device, f"MODEL {request.model}")
        base_N = None
        if base_folder is not None:
            base_N = response_entropies(str(base_folder), texts, device, f"--base {request.base}")
    report = {
        "model": str(found),
        "source": str(request.text or recipe.data.validation),
        "sampled": request.text is None,
        "temperature": recipe.evaluation.temperature if request.text is None else None,
        "responses": len(texts),
        **entropy_report(
            _drawn(texts),
            entropies_N,
            lambda token: tokenizer.decode([token]),
            ratio=request.ratio,
            least_count=request.least_count,
            listed=request.listed,
        ),
    }
    if base_N is not None:
        report["base"] = {"model": str(base), **compared(entropies_N, base_N, ratio=request.ratio, bins=request.bins)}
    return report | {"seconds": round(time.perf_counter() - started, 3)}


def print_report(report: Mapping[str, Any]) -> None:
    """For people; tokens are a model's own text and cannot steer the terminal."""
    top, quantiles, base = report["top"], report["percentiles"], report.get("base")
    how = f"sampled at temperature {report['temperature']:g}" if report["sampled"] else "recorded"
    rows = [
        ("model", report["model"]),
        ("text", f"{report['source']}: {report['responses']} responses {how}, {report['tokens']} tokens"),
        ("entropy", f"mean {report['mean']:.4f} nats; {report['near_zero']:.1%} of the tokens below 0.01"),
        ("percentiles", "  ".join(f"{p}: {value:.4f}" for p, value in quantiles.items())),
        (
            f"top {top['ratio']:.0%}",
            f"{top['tokens']} tokens of {top['least_entropy']:.4f} nats or more, {top['share_of_entropy']:.1%} of all "
            "entropy",
        ),
    ]
    if base is not None:
        overlap = base["overlap"]
        rows += [
            ("base", f"{base['model']}: mean {base['mean']:.4f} nats on the same text"),
            (
                "overlap",
                f"{overlap['shared']} of {overlap['tokens']} top positions are the base's ({overlap['share']:.1%})",
            ),
        ]
    for name, text in rows:
        print(f"{name:<12} {printable(text)}")
    for title, key in (("forking tokens, highest mean entropy", "forking"), ("steady tokens, lowest", "steady")):
        print(f"\n{title} (each {report['least_count']} times or more)\n{'mean':>8} {'count':>7}  token")
        for token in report[key]:
            print(f"{token['mean']:>8.4f} {token['count']:>7}  {shown_token(token['text'])}")
    if base is not None:
        print(f"\n{'base percentiles':<18}{'tokens':>8}{'base mean':>12}{'mean change':>13}")
        for row in base["change"]:
            place = f"{row['from']:g} to {row['to']:g}"
            print(f"{place:<18}{row['tokens']:>8}{row['base_mean']:>12.4f}{row['mean_change']:>+13.4f}")


def shown_token(text: str) -> str:
    """A token's text in quotes, on one line, control characters spelled out."""
    return "'" + printable(text).replace("\n", "\\n").replace("\t", "\\t") + "'"


def _recipe(request: EntropyRequest, found: Path, run: Path | None) -> Recipe:
    """As for an evaluation; without --data and --text the run's own validation prompts."""
    settings = {name: dict(values) for name, values in (request.settings or {}).items()}
    data = request.data
    if data is None and request.text is None:
        whole = None if run is None else load_recipe(run / "config.yaml").data
        if whole is not None and whole.generate is not None:
            data = run / "data" / "validation.jsonl"
        elif whole is not None and whole.validation is not None:
            data = Path(whole.validation)
        else:
            what = "has no validation prompts" if run else "is no run"
            raise RequestError(f"MODEL {request.model} {what}: give --data PROMPTS to sample for, or --text RESPONSES")
    settings["data"] = settings.get("data", {}) | {"validation": None if data is None else str(data)}
    settings["evaluation"] = settings.get("evaluation", {}) | {"max_prompts": request.limit}
    return evaluation_recipe(found, run, settings, request.overrides)


def _tokenizer(folder: Path, base: Path | None, request: EntropyRequest) -> "PreTrainedTokenizerBase":
    """The model's, refused where the base reads other tokens."""
    from dapo_megatron.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(folder)
    if base is None:
        return tokenizer
    ours, theirs = tokenizer.get_vocab(), load_tokenizer(base).get_vocab()
    if ours != theirs:
        apart = sum(theirs.get(token) != i for token, i in ours.items())
        raise RequestError(
            f"--base {request.base}: its vocabulary of {len(theirs)} tokens is not that of {request.model}: of those "
            f"{len(ours)} tokens {apart} are another or missing there, positions could not be compared; use the "
            "model that training began with"
        )
    return tokenizer


def _texts(
    request: EntropyRequest, recipe: Recipe, folder: Path, tokenizer: "PreTrainedTokenizerBase", logs: Path
) -> list["TokenizedText"]:
    from dapo_megatron.analysis.recorded_texts import read_texts
    from dapo_megatron.analysis.token_entropy import TokenizedText
    from dapo_megatron.rollout.engine import RolloutRequest, sample_seed

    if request.text is not None:
        return read_texts(request.text, tokenizer, chat_template=recipe.data.chat_template, limit=request.limit)
    problems, settings = read_problems(recipe, folder), recipe.evaluation
    prompts = [ids for ids in problems.token_ids[: settings.max_prompts] for _ in range(settings.samples)]
    requests = [
        RolloutRequest(
            ticket=i,
            prompt_tokens=prompt,
            seed=sample_seed(settings.seed, 3, *divmod(i, settings.samples)),  # the samples of `evaluate`
            max_new_tokens=recipe.rollout.max_response_length,
            temperature=settings.temperature,
            top_p=settings.top_p,
        )
        for i, prompt in enumerate(prompts)
    ]
    with engine_for(problems, recipe, folder, logs) as dispatcher:
        completions = dispatcher.generate(requests, group=settings.samples)
    return [TokenizedText(prompt, c.tokens) for prompt, c in zip(prompts, completions, strict=True)]


def _check_fit(texts: Sequence["TokenizedText"], folder: Path, option: str) -> None:
    from dapo_megatron.resharding.hf_layout import check_checkpoint

    architecture = read_architecture(folder)
    check_checkpoint(folder, architecture)
    longest = max(map(len, texts))
    if longest > architecture.max_positions:
        raise RequestError(
            f"{option} has {architecture.max_positions} positions and the longest text {longest} tokens; leave out "
            "what is longer"
        )
    highest = max(int(ids.max()) for text in texts for ids in (text.prompt, text.response))
    if highest >= architecture.vocab:
        raise RequestError(
            f"{option} has {architecture.vocab} vocabulary rows and the text holds the token {highest}; it is not the "
            "model's tokenizer"
        )


def _drawn(texts: Sequence["TokenizedText"]):
    import numpy as np

    return np.concatenate([text.response for text in texts])
