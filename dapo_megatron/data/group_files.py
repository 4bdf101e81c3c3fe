"""Prompt groups in a file: rollouts saved for debugging, and groups that a checkpoint keeps for the next step."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dapo_megatron.data.completions import Completion, PromptGroup
from dapo_megatron.errors import RequestError
from dapo_megatron.files import atomic_path

COMPLETION_ARRAYS = ("tokens", "logprobs", "policy_versions")
GROUP_ARRAYS = ("old_logprobs", "entropies", "reference_logprobs")  # of each completion, or of none in the file


def save_groups(path: Path, groups: Sequence[PromptGroup]) -> None:
    """Write at least one group as safetensors; all have as many completions. The file appears whole."""
    from safetensors.numpy import save_file

    completions = [c for g in groups for c in g.completions]
    arrays = {name: np.concatenate([getattr(c, name) for c in completions]) for name in COMPLETION_ARRAYS}
    for name in GROUP_ARRAYS:
        if all(getattr(g, name) for g in groups):
            arrays[name] = np.concatenate([values for g in groups for values in getattr(g, name)])
    arrays["lengths"] = np.array([len(c.tokens) for c in completions], np.int64)
    arrays["accuracies"] = np.stack([g.accuracies for g in groups])
    arrays["rewards"] = np.stack([g.rewards for g in groups]).astype(np.float32)
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
    samples = arrays["rewards"].shape[1]
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
            completions=completions[i * samples : (i + 1) * samples],
            responses=text["responses"][i],
            accuracies=arrays["accuracies"][i],
            rewards=arrays["rewards"][i],
            step=steps[i],
            **{name: cut[name][i * samples : (i + 1) * samples] for name in GROUP_ARRAYS if name in cut},
        )
        for i, (prompt_id, prompt, answer) in enumerate(text["prompts"])
    ]
