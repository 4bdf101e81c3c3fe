"""Conversions that are refused: before anything is written, with what is wrong and what would work."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dapo_megatron.conversion import command, targets
from dapo_megatron.conversion.command import convert
from dapo_megatron.conversion.options import Options, parse_size
from dapo_megatron.conversion.shard_reader import METADATA, read_metadata
from dapo_megatron.errors import RequestError, RunError
from dapo_megatron.learner.manifest import MANIFEST, write_manifest
from dapo_megatron.resharding.hf_layout import SINGLE
from tests.tiny_models import write_model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A model and a checkpoint of it."""
    root = tmp_path_factory.mktemp("made")
    write_model(root / "hf", "qwen2", tied=False)
    convert("hf-to-megatron", root / "hf", root / "shards", ["parallel.tensor=2"])
    return root


def refused(tmp_path, kind, source, *overrides, says, **options):
    """The request is refused with these words and nothing appears."""
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    with pytest.raises(RequestError) as caught:
        convert(kind, source, tmp_path / "out", overrides, Options(**options))
    for part in says:
        assert part in str(caught.value), str(caught.value)
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before


def damaged_model(made, tmp_path, change):
    """A copy of the model whose tensors `change` has altered."""
    shutil.copytree(made / "hf", tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / SINGLE)
    change(tensors)
    save_file(tensors, tmp_path / "hf" / SINGLE)
    return tmp_path / "hf"


@pytest.mark.parametrize("kind", ["hf-to-megatron", "hf-to-hf"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("model.norm.weight"), ("lacks model.norm.weight",)),
        (lambda t: t.update(surplus=torch.zeros(3)), ("surplus",)),
        (
            lambda t: t.update({"model.layers.2.self_attn.q_proj.bias": torch.zeros(63)}),
            ("model.layers.2.self_attn.q_proj.bias", "(63,)", "(64,)"),
        ),
        (lambda t: t.update({"model.norm.weight": torch.zeros(64, dtype=torch.int64)}), ("model.norm.weight", "I64")),
        (lambda t: t.update({"model.norm.weight": torch.zeros(64).half()}), ("float16, float32", "--dtype")),
    ],
)
def test_tensors_that_do_not_fit(made, tmp_path, kind, change, says):
    refused(tmp_path, kind, damaged_model(made, tmp_path, change), says=says)


@pytest.mark.parametrize("cut", [4, 1000, -1])
def test_a_truncated_file(made, tmp_path, cut):
    shutil.copytree(made / "hf", tmp_path / "hf")
    content = (tmp_path / "hf" / SINGLE).read_bytes()
    (tmp_path / "hf" / SINGLE).write_bytes(content[:cut])
    refused(tmp_path, "hf-to-megatron", tmp_path / "hf", says=(SINGLE, "cut short"))


@pytest.mark.parametrize(
    ("offsets", "says"),
    [
        ({"model.layers.1.input_layernorm.weight": (0, -4)}, ("input_layernorm", "252 bytes", "takes 256")),
        ({"model.layers.1.input_layernorm.weight": (-256, -256)}, ("overlap",)),
    ],
)
def test_a_header_whose_offsets_do_not_fit(made, tmp_path, offsets, says):
    shutil.copytree(made / "hf", tmp_path / "hf")
    path = tmp_path / "hf" / SINGLE
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for name, moved in offsets.items():
        header[name]["data_offsets"] = [a + b for a, b in zip(header[name]["data_offsets"], moved, strict=True)]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    refused(tmp_path, "hf-to-hf", tmp_path / "hf", says=says)


def test_places(made, tmp_path):
    refused(tmp_path, "hf-to-hf", tmp_path / "none", says=("no folder", "none"))
    (tmp_path / "empty").mkdir()
    refused(tmp_path, "hf-to-hf", tmp_path / "empty", says=("config.json",))
    refused(tmp_path, "megatron-to-hf", tmp_path / "empty", says=(MANIFEST,))
    shutil.copytree(made / "hf", tmp_path / "hf")
    for destination, says in (("hf", "same folder"), ("hf/inside", "inside the source"), ("empty", "exists")):
        with pytest.raises(RequestError, match=says):
            convert("hf-to-hf", tmp_path / "hf", tmp_path / destination)
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="no folder that may be written"):
        convert("hf-to-hf", tmp_path / "hf", tmp_path / "file" / "out")


@pytest.mark.parametrize(
    ("kind", "overrides", "options", "says"),
    [
        ("hf-to-megatron", ["parallel.tensor=3"], {}, ("parallel.tensor=3", "use 1, 2 or 4")),
        ("hf-to-megatron", ["parallel.virtual_pipeline=2"], {}, ("parallel.pipeline > 1",)),
        ("hf-to-megatron", ["run.steps=1"], {}, ("parallel.*", "run.steps=1")),
        ("hf-to-hf", ["parallel.tensor=2"], {}, ("leave out parallel.tensor=2",)),
        ("hf-to-hf", [], {"dtype": "int8"}, ("--dtype int8", "bf16")),
        (
            "hf-to-hf",
            [],
            {"dtype": "fp16"},
            ("lose range", "model.embed_tokens.weight is float32", "--allow-loss", "6.55e+04"),
        ),
        ("hf-to-hf", [], {"max_memory": 100 << 20}, ("--max-memory 100MiB", "448MiB")),
    ],
)
def test_settings(made, tmp_path, kind, overrides, options, says):
    refused(tmp_path, kind, made / "hf", *overrides, says=says, **options)


def test_a_disk_without_room(made, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(command.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    refused(tmp_path, "hf-to-megatron", made / "hf", says=("1000 free", "needs"))


@pytest.mark.parametrize(("text", "size"), [("2GiB", 2 << 30), ("512MiB", 512 << 20), ("1.5GB", 1500000000), ("7", 7)])
def test_sizes(text, size):
    assert parse_size("--max-memory", text) == size


@pytest.mark.parametrize("text", ["", "GiB", "2 bananas", "-1", "1.2.3"])
def test_what_is_no_size(text):
    with pytest.raises(RequestError, match="--max-memory"):
        parse_size("--max-memory", text)


def test_a_changed_shard(made, tmp_path):
    shutil.copytree(made / "shards", tmp_path / "shards")
    path = tmp_path / "shards" / "shards" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    refused(tmp_path, "megatron-to-hf", tmp_path / "shards", says=("__0_0.distcp", "has changed"))


def with_new_sums(folder):
    """What somebody who changes a checkpoint on purpose would do."""
    write_manifest(folder)


@pytest.mark.parametrize("cut", [100, -40])
def test_a_shard_that_is_cut_short_behind_a_manifest_that_agrees(made, tmp_path, cut):
    shutil.copytree(made / "shards", tmp_path / "shards")
    path = tmp_path / "shards" / "shards" / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:cut])
    with_new_sums(tmp_path / "shards")
    refused(tmp_path, "megatron-to-hf", tmp_path / "shards", says=("__1_0.distcp", "cannot be read"))


def test_a_missing_shard_behind_a_manifest_that_agrees(made, tmp_path):
    shutil.copytree(made / "shards", tmp_path / "shards")
    (tmp_path / "shards" / "shards" / "__1_0.distcp").unlink()
    with_new_sums(tmp_path / "shards")
    refused(tmp_path, "megatron-to-megatron", tmp_path / "shards", says=("lacks __1_0.distcp",))


def test_weights_that_metadata_lacks(made, tmp_path):
    shutil.copytree(made / "shards", tmp_path / "shards")
    path = tmp_path / "shards" / "shards" / METADATA
    metadata = read_metadata(path)
    del metadata.state_dict_metadata["decoder.final_layernorm.weight"]
    path.write_bytes(pickle.dumps(metadata))
    with_new_sums(tmp_path / "shards")
    refused(tmp_path, "megatron-to-hf", tmp_path / "shards", says=("lacks decoder.final_layernorm.weight",))


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_metadata_runs_nothing(made, tmp_path, monkeypatch):
    shutil.copytree(made / "shards", tmp_path / "shards")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "shards" / "shards" / METADATA
    metadata = read_metadata(path)
    metadata.planner_data = Hostile()
    path.write_bytes(pickle.dumps(metadata))
    with_new_sums(tmp_path / "shards")
    refused(tmp_path, "megatron-to-hf", tmp_path / "shards", says=("mkdir", "refused"))
    path.write_bytes(b"no pickle")
    with_new_sums(tmp_path / "shards")
    refused(tmp_path, "megatron-to-hf", tmp_path / "shards", says=("is not checkpoint metadata",))


@pytest.mark.parametrize("kind", ["hf-to-megatron", "hf-to-hf"])
def test_a_result_that_differs_is_found(made, tmp_path, monkeypatch, kind):
    """One bit of one weight, behind the writer's back."""
    name = "MegatronTarget" if kind == "hf-to-megatron" else "HuggingFaceTarget"
    finish = getattr(targets, name).finish

    def disturb(self, workspace):
        finish(self, workspace)
        path = next(p for p in sorted(workspace.content.rglob("*")) if p.suffix in (".distcp", ".safetensors"))
        needle = load_file(made / "hf" / SINGLE)["model.layers.1.self_attn.k_proj.bias"][:8].numpy().tobytes()
        content = bytearray(path.read_bytes())
        content[content.index(needle)] ^= 1
        path.write_bytes(content)

    monkeypatch.setattr(f"dapo_megatron.conversion.targets.{name}.finish", disturb)
    with pytest.raises(RunError, match=r"model\.layers\.1\.self_attn\.k_proj\.bias"):
        convert(kind, made / "hf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    convert(kind, made / "hf", tmp_path / "out", options=Options(verify=False))
    assert (tmp_path / "out").is_dir()


def test_padding_that_is_not_zero_is_found(made, tmp_path, monkeypatch):
    from dapo_megatron.conversion.sources import Source

    stored = Source.stored

    def dirty(self, name, box):
        found = stored(self, name, box)
        if name == "output_layer.weight" and box[0][1] > self.architecture.vocab:
            found[-1] = 1.0
        return found

    monkeypatch.setattr(Source, "stored", dirty)
    with pytest.raises(RunError, match=r"output_layer\.weight has rows beyond the vocabulary"):
        convert("hf-to-megatron", made / "hf", tmp_path / "out")
