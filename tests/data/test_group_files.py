import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from dapo_megatron.data.completions import Completion, PromptGroup, SegmentCounts
from dapo_megatron.data.group_files import GROUP_ARRAYS, load_groups, save_groups
from dapo_megatron.errors import RequestError


def group(number: int, lengths: list[int], *, scored: bool) -> PromptGroup:
    rng = np.random.default_rng(number)
    completions = [
        Completion(
            i, rng.integers(0, 99, n).astype(np.int32), -rng.random(n, np.float32), "stop" if i else "length",
            np.full(n, number, np.int32),
        )
        for i, n in enumerate(lengths)
    ]  # fmt: skip
    return PromptGroup(
        prompt_id=number,
        text=f"What is {number}?\n\u4f60",
        answer=str(number),
        prompt_tokens=rng.integers(0, 99, 3 + number).astype(np.int32),
        completions=completions,
        responses=[f"{number} {i}" for i in range(len(lengths))],
        accuracies=rng.random(len(lengths)) > 0.5,
        rewards=rng.random(len(lengths), np.float32),
        step=number,
        old_logprobs=[-rng.random(n, np.float32) for n in lengths] if scored else [],
        entropies=[rng.random(n, np.float32) for n in lengths] if scored else [],
        reference_logprobs=[-rng.random(n, np.float32) for n in lengths] if scored else [],
        advantages=[rng.random(n, np.float32) for n in lengths] if scored else [],
        weights=[np.ones(n, np.float32) for n in lengths] if scored else [],
        counts=SegmentCounts(5, 2, 9, 30 + number, 4) if scored else None,
    )


@pytest.mark.parametrize("scored", [False, True])
def test_groups_come_back_bit_equal(tmp_path, scored):
    groups = [group(0, [3, 1], scored=scored), group(5, [2, 7, 4], scored=scored)]
    save_groups(tmp_path / "groups.safetensors", groups)
    found = load_groups(tmp_path / "groups.safetensors")
    assert len(found) == 2
    for a, b in zip(groups, found, strict=True):
        for name in ("prompt_id", "text", "answer", "responses", "step", "counts"):
            assert getattr(a, name) == getattr(b, name)
        for name in ("prompt_tokens", "accuracies", "rewards"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name), strict=True)
        for name in GROUP_ARRAYS:
            assert len(getattr(a, name)) == len(getattr(b, name))
            for x, y in zip(getattr(a, name), getattr(b, name), strict=True):
                np.testing.assert_array_equal(x, y, strict=True)
        for x, y in zip(a.completions, b.completions, strict=True):
            assert x.finish_reason == y.finish_reason
            for name in ("tokens", "logprobs", "policy_versions"):
                np.testing.assert_array_equal(getattr(x, name), getattr(y, name), strict=True)


def test_files_of_before_groups_could_differ_in_size_are_read(tmp_path):
    path = tmp_path / "groups.safetensors"
    groups = [group(0, [3, 1], scored=False), group(5, [2, 7], scored=False)]
    save_groups(path, groups)
    with safe_open(path, framework="np") as opened:
        metadata, arrays = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    del arrays["samples"]
    arrays |= {name: arrays[name].reshape(2, 2) for name in ("accuracies", "rewards")}
    save_file(arrays, path, metadata=metadata)
    for a, b in zip(groups, load_groups(path), strict=True):
        assert a.responses == b.responses and a.rewards.tolist() == b.rewards.tolist()
        assert [c.tokens.tolist() for c in a.completions] == [c.tokens.tolist() for c in b.completions]


def test_another_file_is_refused(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(RequestError, match=r"x\.safetensors is not a rollout file"):
        load_groups(tmp_path / "x.safetensors")
