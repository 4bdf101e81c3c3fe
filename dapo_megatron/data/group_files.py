"""Prompt groups in a file: rollouts saved for debugging, and groups that a checkpoint keeps for the next step."""

import json
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path

import numpy as np

from dapo_megatron.data.completions import Completion, PromptGroup, SegmentCounts
from dapo_megatron.errors import RequestError
from dapo_megatron.files import atomic_path

COMPLETION_ARRAYS = ("tokens", "logprobs", "policy_versions")
# of each completion, or of none in the file
GROUP_ARRAYS = ("old_logprobs", "entropies", "reference_logprobs", "advantages", "weights")


def save_groups(path: Path, groups: Sequence[PromptGroup]) -> None:
    """Write at least one group as safetensors. The file appears whole."""
    from safetensors.numpy import save_file

    completions = [c for g in groups for c in g.completions]
    arrays = {name: np.concatenate([getattr(c, name) for c in completions]) for name in COMPLETION_ARRAYS}
    for name in GROUP_ARRAYS:
        if all(getattr(g, name) for g in groups):
            arrays[name] = np.concatenate([values for g in groups for values in getattr(g, name)])
    arrays["lengths"] = np.array([len(c.tokens) for c in completions], np.int64)
    arrays["samples"] = np.array([len(g.completions) for g in groups], np.int64)
    arrays["accuracies"] = np.concatenate([g.accuracies for g in groups])
    arrays["rewards"] = np.concatenate([g.rewards for g in groups]).astype(np.float32)
    if all(g.counts is not None for g in groups):
        arrays["counts"] = np.array([astuple(g.counts) for g in groups], np.int64)
    arrays["steps"] = np.array([g.step for g in groups], np.int64)
    arrays["prompt_tokens"] = np.concatenate([g.prompt_tokens for g in groups])
    arrays["prompt_lengths"] = np.array([len(g.prompt_tokens) for g in groups], np.int64)
    text = {
        "prompts": [[g.prompt_id, g.text, g.answer] for g in groups],
        "responses": [g.responses for g in groups],
        "finish_reasons": [c.finish_reason for c in completions],
    }
    with atomic_path(path) as temporary:
        save_file(arrays, temporary, metadata={"text": json.dumps(text)})


def load_groups(path: Path) -> list[PromptGroup]:
    """The groups of a file that `save_groups` wrote, bit-equal.

    Raises:
        RequestError: it is another file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as opened:
            text = json.loads(opened.metadata()["text"])
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise RequestError(f"{path} is not a rollout file: {error}") from None
    return _groups(text, arrays)


def _groups(text: dict, arrays: dict[str, np.ndarray]) -> list[PromptGroup]:
    if "samples" not in arrays:  # an older file: rewards [B, G]
        arrays["samples"] = np.full(*arrays["rewards"].shape)
    ends = np.cumsum(arrays["samples"]).tolist()
    parts = [slice(end - count, end) for end, count in zip(ends, arrays["samples"].tolist(), strict=True)]
    accuracies, rewards, counts = arrays["accuracies"].reshape(-1), arrays["rewards"].reshape(-1), arrays.get("counts")
    stops = np.cumsum(arrays["lengths"])[:-1]
    cut = {name: np.split(arrays[name], stops) for name in (*COMPLETION_ARRAYS, *GROUP_ARRAYS) if name in arrays}
    completions = [
        Completion(i, cut["tokens"][i], cut["logprobs"][i], reason, cut["policy_versions"][i])
        for i, reason in enumerate(text["finish_reasons"])
    ]
    prompts = np.split(arrays["prompt_tokens"], np.cumsum(arrays["prompt_lengths"])[:-1])
    steps = arrays.get("steps", np.zeros(len(prompts), np.int64)).tolist()
    return [
        PromptGroup(
            prompt_id=prompt_id,
            text=prompt,
            answer=answer,
            prompt_tokens=prompts[i],
            completions=completions[part],
            responses=text["responses"][i],
            accuracies=accuracies[part],
            rewards=rewards[part],
            step=steps[i],
            counts=None if counts is None else SegmentCounts(*counts[i].tolist()),
            **{name: cut[name][part] for name in GROUP_ARRAYS if name in cut},
        )
        for i, (part, (prompt_id, prompt, answer)) in enumerate(zip(parts, text["prompts"], strict=True))
    ]
