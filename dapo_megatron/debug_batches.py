"""Rollouts saved to files and learned from later, to debug one half of the loop without the other."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dapo_megatron.data.completions import Completion, PromptGroup
from dapo_megatron.errors import RequestError
from dapo_megatron.files import atomic_path

if TYPE_CHECKING:
    from dapo_megatron.assemble import Run

ARRAYS = ("tokens", "logprobs", "policy_versions")


def save_batch(run: "Run", groups: Sequence[PromptGroup]) -> Path | None:
    """Write the groups of the present step to RUN/debug/rollout-NNNNNN.safetensors (rank 0)."""
    if run.world.rank != 0 or not groups:
        return None
    from safetensors.numpy import save_file

    completions = [c for g in groups for c in g.completions]
    arrays = {name: np.concatenate([getattr(c, name) for c in completions]) for name in ARRAYS}
    arrays["lengths"] = np.array([len(c.tokens) for c in completions], np.int64)
    arrays["accuracies"] = np.stack([g.accuracies for g in groups])
    arrays["rewards"] = np.stack([g.rewards for g in groups]).astype(np.float32)
    arrays["prompt_tokens"] = np.concatenate([g.prompt_tokens for g in groups])
    arrays["prompt_lengths"] = np.array([len(g.prompt_tokens) for g in groups], np.int64)
    text = {
        "prompts": [[g.prompt_id, g.text, g.answer] for g in groups],
        "responses": [g.responses for g in groups],
        "finish_reasons": [c.finish_reason for c in completions],
    }
    path = run.paths.run / "debug" / f"rollout-{run.step + 1:06d}.safetensors"
    with atomic_path(path) as temporary:
        save_file(arrays, temporary, metadata={"text": json.dumps(text)})
    return path


def find_batches(path: Path) -> list[Path]:
    """The file itself, or all rollout files of a folder in step order. Raises RequestError when there is none."""
    files = sorted(path.glob("rollout-*.safetensors")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise RequestError(f"--debug-train-only {path}: no rollout file there; --debug-rollout-only writes RUN/debug/")
    return files


def load_batches(files: Sequence[Path]) -> Iterator[list[PromptGroup]]:
    """The groups of each file.

    Raises:
        RequestError: not a file that `save_batch` wrote.
    """
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(file, framework="np") as opened:
                text = json.loads(opened.metadata()["text"])
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            raise RequestError(f"{file} is not a rollout file: {error}") from None
        yield _groups(text, arrays)


def _groups(text: dict, arrays: dict[str, np.ndarray]) -> list[PromptGroup]:
    stops = np.cumsum(arrays["lengths"])
    samples = arrays["rewards"].shape[1]
    completions = [
        Completion(i, *(arrays[name][stop - n : stop] for name in ("tokens", "logprobs")), reason,
                   arrays["policy_versions"][stop - n : stop])
        for i, (n, stop, reason) in enumerate(zip(arrays["lengths"], stops, text["finish_reasons"], strict=True))
    ]  # fmt: skip
    prompts = np.split(arrays["prompt_tokens"], np.cumsum(arrays["prompt_lengths"])[:-1])
    return [
        PromptGroup(
            prompt_id=prompt_id,
            text=prompt,
            answer=answer,
            prompt_tokens=prompts[i],
            completions=completions[i * samples : (i + 1) * samples],
            responses=text["responses"][i],
            accuracies=arrays["accuracies"][i],
            rewards=arrays["rewards"][i],
        )
        for i, (prompt_id, prompt, answer) in enumerate(text["prompts"])
    ]
