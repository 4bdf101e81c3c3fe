"""Saved rollouts are learned from by recipes of the shape that they were drawn with."""

from pathlib import Path

import numpy as np
import pytest

from dapo_megatron.data.completions import Completion, PromptGroup
from dapo_megatron.data.group_files import save_groups
from dapo_megatron.debug_batches import load_batches
from dapo_megatron.errors import RequestError


def saved(path: Path, *, valued: bool) -> Path:
    tokens, numbers = np.array([1, 2], np.int32), np.zeros(2, np.float32)
    group = PromptGroup(
        0, "q", "a", tokens, [Completion(0, tokens, numbers, "stop", tokens)], ["r"],
        accuracies=np.array([True]), rewards=np.array([1.0], np.float32),
        advantages=[numbers] if valued else [], weights=[numbers] if valued else [],
    )  # fmt: skip
    save_groups(path, [group])
    return path


def test_segments_and_whole_responses_are_not_taken_for_each_other(tmp_path: Path):
    whole, cut = (saved(tmp_path / f"{n}.safetensors", valued=n == "cut") for n in ("whole", "cut"))
    for file, shapes in ((whole, ("independent", "preferences")), (cut, ("chain", "tree"))):
        for shape in shapes:
            assert len(list(load_batches([file, file], shape=shape))) == 2
    with pytest.raises(RequestError, match=r"whole\.safetensors was drawn with rollout.shape=independent.*shape=tree"):
        list(load_batches([whole], shape="tree"))
    with pytest.raises(RequestError, match=r"cut.* was drawn with rollout.shape=chain or tree.*shape=independent"):
        list(load_batches([cut], shape="independent"))
