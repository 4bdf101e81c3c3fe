import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.resharding.hf_files import file_groups, folder_dtype, read_placements, write_folder
from dapo_megatron.resharding.hf_layout import canonical_tensors, check_checkpoint, whole_layout
from dapo_megatron.resharding.megatron_layout import megatron_layout
from tests.resharding.worlds import PADDING, architecture, layout_for, numbered, shards
from tests.tiny_models import load_model, write_model


def side_files(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "torch_dtype": "float64"}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("not copied")
    return folder


def random_tensors(a, dtype=torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape).to(dtype) for name, shape in canonical_tensors(a).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("most_bytes", [1, 1000, 1 << 30])
def test_a_folder_is_written_and_read_back(tmp_path, dtype, most_bytes):
    a = architecture()
    tensors = random_tensors(a, dtype)
    groups = list(file_groups(canonical_tensors(a), dtype.itemsize, most_bytes))
    asked = []

    def give(names):
        asked.append(list(names))
        return {name: tensors[name] for name in names}

    folder = tmp_path / "saved"
    write_folder(folder, groups, give, side_files=side_files(tmp_path / "base"), dtype=dtype)
    assert asked == groups
    check_checkpoint(folder, a)
    assert folder_dtype(folder) == dtype
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == len(groups) == {1: len(tensors), 1 << 30: 1}.get(most_bytes, len(groups))
    assert (folder / "model.safetensors.index.json").is_file() == (len(groups) > 1)
    for file in files:
        with safe_open(file, "pt") as opened:
            assert all(torch.equal(opened.get_tensor(name), tensors[name]) for name in opened.keys())  # noqa: SIM118
    read = {name: torch.full_like(tensor, 7) for name, tensor in tensors.items()}
    read_placements(folder, whole_layout(a, [0]).placements[0], read)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    config = json.loads((folder / "config.json").read_text())
    assert config == {"model_type": "qwen2", "torch_dtype": str(dtype).removeprefix("torch.")}
    assert (folder / "tokenizer.json").is_file() and not (folder / "notes.txt").exists()
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_written_folder_loads_in_transformers(tmp_path):
    base = write_model(tmp_path / "base", "qwen2", tied=True)
    tensors = {name: p.detach() * 2 for name, p in load_model(base).named_parameters()}
    groups = list(file_groups({name: tuple(t.shape) for name, t in tensors.items()}, 4, 40_000))
    assert len(groups) > 1
    write_folder(
        tmp_path / "new", groups, lambda names: {n: tensors[n] for n in names}, side_files=base, dtype=torch.float32
    )
    loaded = dict(load_model(tmp_path / "new").named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_an_older_folder_is_replaced_whole(tmp_path):
    a, base = architecture(), side_files(tmp_path / "base")
    old, new = random_tensors(a), {name: t + 1 for name, t in random_tensors(a).items()}
    for tensors, most_bytes in ((old, 500), (new, 1 << 30)):
        groups = list(file_groups(canonical_tensors(a), 4, most_bytes))
        write_folder(
            tmp_path / "m",
            groups,
            lambda names, t=tensors: {n: t[n] for n in names},
            side_files=base,
            dtype=torch.float32,
        )
    assert [path.name for path in (tmp_path / "m").glob("*.safetensors*")] == ["model.safetensors"]
    read = {name: torch.zeros_like(t) for name, t in new.items()}
    read_placements(tmp_path / "m", whole_layout(a, [0]).placements[0], read)
    assert all(torch.equal(read[name], new[name]) for name in new)


def test_a_failure_leaves_the_older_folder_as_it_was(tmp_path):
    a, base = architecture(), side_files(tmp_path / "base")
    tensors = random_tensors(a)
    groups = list(file_groups(canonical_tensors(a), 4, 500))

    def give(names):
        if names == groups[-1]:
            raise RunError("a rank is gone")
        return {n: tensors[n] for n in names}

    write_folder(
        tmp_path / "m", groups, lambda names: {n: tensors[n] for n in names}, side_files=base, dtype=torch.float32
    )
    with pytest.raises(RunError, match="a rank is gone"):
        write_folder(tmp_path / "m", groups, give, side_files=base, dtype=torch.float32)
    check_checkpoint(tmp_path / "m", a)
    with pytest.raises(RunError, match="a rank is gone"):
        write_folder(tmp_path / "never", groups, give, side_files=base, dtype=torch.float32)
    assert not (tmp_path / "never").exists()


def test_a_rank_without_tensors_writes_nothing_but_takes_part(tmp_path):
    asked = []
    write_folder(
        tmp_path / "m",
        [["a"], ["b"]],
        lambda names: asked.append(list(names)),
        side_files=tmp_path,
        dtype=torch.float32,
    )
    assert asked == [["a"], ["b"]] and not list(tmp_path.iterdir())


def test_a_folder_without_config_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match=r"config\.json is missing"):
        write_folder(
            tmp_path / "m",
            [["w"]],
            lambda names: {"w": torch.zeros(2)},
            side_files=tmp_path / "empty",
            dtype=torch.float32,
        )
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("pieces", [1, 4])
def test_megatron_ranks_read_their_boxes_and_padding_becomes_zero(tmp_path, pieces):
    a = architecture(heads=4, kv_heads=1, vocab=70)  # of 4 ranks the last two hold no real vocabulary row
    layout = layout_for(a, tensor=4, pipeline=2)
    whole = {name: tensor.float() for name, tensor in numbered(a).items()}
    groups = [list(whole)[i::pieces] for i in range(pieces)]
    base = side_files(tmp_path / "base")
    write_folder(
        tmp_path / "m", groups, lambda names: {n: whole[n] for n in names}, side_files=base, dtype=torch.float32
    )
    found = megatron_layout(a, layout)
    for rank, local in shards(a, layout, numbered(a)).items():
        tensors = {key: torch.full(tensor.shape, float("nan")) for key, tensor in local.items()}
        read_placements(tmp_path / "m", found.placements[rank], tensors)
        for key, tensor in local.items():
            assert torch.equal(tensors[key], torch.where(tensor == PADDING, 0, tensor).float()), (rank, key)


def test_reading_a_tensor_that_is_not_there(tmp_path):
    save_file({"model.norm.weight": torch.zeros(6)}, tmp_path / "model.safetensors")
    placements = whole_layout(architecture(), [0], ["model.embed_tokens.weight"]).placements[0]
    with pytest.raises(RequestError, match=r"lacks model\.embed_tokens\.weight"):
        read_placements(tmp_path, placements, {"model.embed_tokens.weight": torch.zeros(100, 6)})


def test_folder_dtype(tmp_path):
    save_file({"a": torch.zeros(1).bfloat16(), "b": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(RequestError, match="BF16, F32"):
        folder_dtype(tmp_path)
    save_file({"a": torch.zeros(1, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(RequestError, match="I8"):
        folder_dtype(tmp_path)


def test_folder_dtype_looks_past_rotary_buffers_that_a_check_lets_through(tmp_path):
    tensors = {
        "model.norm.weight": torch.zeros(6).bfloat16(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    assert folder_dtype(tmp_path) == torch.bfloat16


@given(
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=2).map(tuple), max_size=20),
    st.sampled_from([2, 4]),
    st.integers(1, 200),
)
def test_file_groups(shapes, itemsize, most_bytes):
    named = {f"t{i}": shape for i, shape in enumerate(shapes)}
    groups = list(file_groups(named, itemsize, most_bytes))
    assert [name for group in groups for name in group] == list(named)
    size = lambda names: sum(itemsize * math.prod(named[n]) for n in names)  # noqa: E731
    assert all(group and (size(group) <= most_bytes or len(group) == 1) for group in groups)
    # none could take the first of the next
    assert all(size([*a, b[0]]) > most_bytes for a, b in pairwise(groups))
