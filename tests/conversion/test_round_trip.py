"""Weights through every form and layout and back, bit for bit."""

import json
import runpy
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from dapo_megatron.config import read_architecture
from dapo_megatron.conversion.command import convert
from dapo_megatron.conversion.options import Options
from dapo_megatron.conversion.sources import open_megatron
from dapo_megatron.learner.manifest import check_manifest, read_state
from dapo_megatron.resharding.hf_layout import INDEX, SINGLE, check_checkpoint, read_headers
from tests.command_line import ROOT
from tests.tiny_models import load_model, write_model

TP4PP2VPP2 = ("parallel.tensor=4", "parallel.pipeline=2", "parallel.virtual_pipeline=2")


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Small enough to cut most tensors of a tiny model."""
    monkeypatch.setattr(Options, "piece_bytes", 1000)


def folder_tensors(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(load_file(path))
    return found


def assert_same_bits(found, expected):
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize(
    ("family", "tied", "dtype"),
    [
        ("qwen2", True, torch.bfloat16),
        ("qwen2", False, torch.float32),
        ("llama", False, torch.bfloat16),
        ("qwen3", True, torch.float32),
    ],
)
def test_hf_megatron_megatron_hf(tmp_path, capsys, family, tied, dtype):
    source = write_model(tmp_path / "source", family, tied=tied, dtype=dtype)
    tensors = load_file(source / SINGLE)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name].view(-1)[:3] = torch.tensor([float("nan"), -0.0, float("inf")])
    save_file(tensors, source / SINGLE, metadata={"format": "pt"})
    convert("hf-to-megatron", source, tmp_path / "a", TP4PP2VPP2)
    assert len(list((tmp_path / "a" / "shards").glob("*.distcp"))) == 8
    convert("megatron-to-megatron", tmp_path / "a", tmp_path / "b", ["parallel.tensor=2"])
    convert("megatron-to-hf", tmp_path / "b", tmp_path / "back", options=Options(file_size=30000))
    assert_same_bits(folder_tensors(tmp_path / "back"), tensors)
    assert capsys.readouterr().out.count(f"verified {len(tensors)} tensors") == 3
    for checkpoint in ("a", "b"):
        check_manifest(tmp_path / checkpoint)
        assert read_state(tmp_path / checkpoint) == {
            "step": 0, "updates": 0, "dtype": "F32" if dtype is torch.float32 else "BF16",
        }  # fmt: skip
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "back", "source"]


def test_transformers_reads_the_result(tmp_path):
    source = write_model(tmp_path / "source", "qwen3", tied=True)
    convert("hf-to-megatron", source, tmp_path / "a", ["parallel.pipeline=4"])
    convert("megatron-to-hf", tmp_path / "a", tmp_path / "back", options=Options(file_size=50000))
    tokens = torch.tensor([[3, 14, 15, 9, 2, 6]])
    assert torch.equal(load_model(tmp_path / "back")(tokens).logits, load_model(source)(tokens).logits)


def test_files_are_cut_again_and_cast(tmp_path):
    source = write_model(tmp_path / "source", "llama", tied=False)
    convert("hf-to-hf", source, tmp_path / "cut", options=Options(dtype="bf16", file_size=40000))
    files = sorted((tmp_path / "cut").glob("*.safetensors"))
    assert len(files) > 3
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "cut" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in folder_tensors(tmp_path / "cut").values())
    assert {index["weight_map"][name] for name in read_headers(tmp_path / "cut")} == {path.name for path in files}
    assert all(sum(t.nbytes for t in load_file(path).values()) <= 40000 for path in files)
    expected = {name: tensor.bfloat16() for name, tensor in load_file(source / SINGLE).items()}
    assert_same_bits(folder_tensors(tmp_path / "cut"), expected)
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["dtype"] == "bfloat16"
    convert("hf-to-hf", tmp_path / "cut", tmp_path / "one")
    assert_same_bits(load_file(tmp_path / "one" / SINGLE), expected)


@pytest.mark.parametrize(("given", "asked"), [(torch.float32, "bf16"), (torch.bfloat16, "fp32")])
def test_a_dtype_on_the_way_into_shards(tmp_path, given, asked):
    source = write_model(tmp_path / "source", "qwen2", tied=True, dtype=given)
    convert("hf-to-megatron", source, tmp_path / "a", TP4PP2VPP2, Options(dtype=asked))
    convert("megatron-to-hf", tmp_path / "a", tmp_path / "back")
    wanted = {"bf16": torch.bfloat16, "fp32": torch.float32}[asked]
    assert_same_bits(
        folder_tensors(tmp_path / "back"), {n: t.to(wanted) for n, t in load_file(source / SINGLE).items()}
    )
    assert read_state(tmp_path / "a")["dtype"] == {"bf16": "BF16", "fp32": "F32"}[asked]
    assert json.loads((tmp_path / "a" / "hf" / "config.json").read_text())["dtype"] == str(wanted)[6:]


def test_infinities_where_loss_is_allowed(tmp_path):
    source = write_model(tmp_path / "source", "llama", tied=False)
    tensors = load_file(source / SINGLE)
    tensors["model.norm.weight"][3] = 1e6
    save_file(tensors, source / SINGLE, metadata={"format": "pt"})
    convert("hf-to-hf", source, tmp_path / "half", options=Options(dtype="fp16", allow_loss=True))
    assert_same_bits(load_file(tmp_path / "half" / SINGLE), {name: t.half() for name, t in tensors.items()})


def test_padding_of_another_size(tmp_path):
    """With a tensor-parallel size that does not divide 64 the vocabulary is padded further, and back again."""
    shapes = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3, "vocab_size": 100}
    source = write_model(tmp_path / "source", "llama", tied=True, **shapes)
    rows = {}
    folder = source
    for name, setting in (("three", "parallel.tensor=3"), ("one", "parallel.tensor=1")):
        kind = "hf-to-megatron" if folder is source else "megatron-to-megatron"
        convert(kind, folder, tmp_path / name, [setting])
        folder = tmp_path / name
        stored = open_megatron(folder).files
        rows[name] = stored.tensors["embedding.word_embeddings.weight"].shape[0]
        assert not stored.read("embedding.word_embeddings.weight", ((100, rows[name]), (0, 96))).any()
    assert rows == {"three": 192, "one": 128}
    convert("megatron-to-hf", folder, tmp_path / "back")
    assert_same_bits(folder_tensors(tmp_path / "back"), load_file(source / SINGLE))


def test_copies_that_carry_nothing_are_dropped(tmp_path):
    """A tied model with its lm_head written along, and old rotary buffers."""
    source = write_model(tmp_path / "source", "llama", tied=True)
    tensors = load_file(source / SINGLE)
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
    }
    save_file({**tensors, **extra}, source / SINGLE, metadata={"format": "pt"})
    convert("hf-to-hf", source, tmp_path / "out")
    check_checkpoint(tmp_path / "out", read_architecture(tmp_path / "out"))
    assert_same_bits(load_file(tmp_path / "out" / SINGLE), tensors)


def test_the_tool_is_the_command(tmp_path, monkeypatch, capsys):
    """tools/convert_checkpoint.py, as a script is run."""
    source = write_model(tmp_path / "source", "llama", tied=True)
    script = str(ROOT / "tools" / "convert_checkpoint.py")
    monkeypatch.setattr(sys, "argv", [script, "hf-to-megatron", str(source), str(tmp_path / "a"), *TP4PP2VPP2])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    assert not end.value.code and capsys.readouterr().out.rstrip().endswith(str(tmp_path / "a"))
    monkeypatch.setattr(sys, "argv", [script, "hf-to-hf", str(tmp_path / "nowhere"), str(tmp_path / "b")])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(script, run_name="__main__")
    assert end.value.code == 2 and "nowhere" in capsys.readouterr().err
